import { assert, withSandbox, until } from './lib.mjs'

const decoder = new TextDecoder()

withSandbox('a terminal', async (sandbox) => {
  let text = ''
  const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData: (data) => { text += decoder.decode(data) }, envs: { ABC: '123' }, timeoutMs: 60_000 })
  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('echo "<$ABC $TERM $(tput cols)x$(tput lines)>"\n'))
  await until('the echo', () => text.includes('<123 xterm-256color 80x24>'))
  await sandbox.pty.resize(pty.pid, { cols: 100, rows: 30 })
  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('echo "<$(tput cols)x$(tput lines)>"\n'))
  await until('the new size', () => text.includes('<100x30>'))
  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('exit\n'))
  assert.equal((await pty.wait()).exitCode, 0)
})

withSandbox('a terminal that is left and found again', async (sandbox) => {
  let text = ''
  const first = await sandbox.pty.create({ cols: 80, rows: 24, onData: () => {}, timeoutMs: 0 })
  await first.disconnect()
  const again = await sandbox.pty.connect(first.pid, { onData: (data) => { text += decoder.decode(data) } })
  await sandbox.pty.sendInput(first.pid, new TextEncoder().encode('echo still $((40 + 2))\n'))
  await until('an answer', () => text.includes('still 42'))
  assert.equal(await sandbox.pty.kill(first.pid), true)
  await assert.rejects(again.wait())
})
