import { Sandbox, CommandExitError, TimeoutError, assert, test, withSandbox, until, newer } from './lib.mjs'

withSandbox('foreground', { envs: { FROM: 'create' } }, async (sandbox) => {
  const r = await sandbox.commands.run('echo out; echo err >&2; echo $FROM $MORE; pwd; whoami', { envs: { MORE: 'call' }, cwd: '/tmp' })
  assert.equal(r.exitCode, 0)
  assert.equal(r.stdout, 'out\ncreate call\n/tmp\nuser\n')
  assert.equal(r.stderr, 'err\n')
  assert.equal((await sandbox.commands.run('pwd')).stdout, '/home/user\n')
  assert.equal((await sandbox.commands.run('whoami; pwd', { user: 'root' })).stdout, 'root\n/root\n')
  assert.equal((await sandbox.commands.run('sudo whoami')).stdout, 'root\n')
  assert.equal((await sandbox.commands.run('sudo echo "$FOO"', { envs: { FOO: 'kept' } })).stdout, 'kept\n')
  assert.equal((await sandbox.commands.run('tput -T xterm-256color colors; python --version; git --version; curl --version | head -1; cat /proc/sys/kernel/random/boot_id; ps -o pid= -p $$')).exitCode, 0)
})

withSandbox('failures', async (sandbox) => {
  await assert.rejects(sandbox.commands.run('echo gone; echo why >&2; exit 3'), (e) => {
    assert.ok(e instanceof CommandExitError)
    assert.deepEqual([e.exitCode, e.stdout, e.stderr], [3, 'gone\n', 'why\n'])
    return true
  })
  await assert.rejects(sandbox.commands.run('no-such-program'), (e) => e.exitCode === 127)
  await assert.rejects(sandbox.commands.run('true', { cwd: '/no/such/place' }), /no\/such\/place/)
  await assert.rejects(sandbox.commands.run('true', { user: 'nobody-of-that-name' }))
  await assert.rejects(sandbox.commands.run('kill -9 $$'), (e) => e.exitCode !== 0)
})

withSandbox('output comes as it is written', async (sandbox) => {
  const seen = []
  // The command goes on when its first line has come.
  const r = await sandbox.commands.run('echo line 1; until [ -e /tmp/seen ]; do sleep 0.05; done; echo line 2', {
    onStdout: async (data) => {
      seen.push(data)
      if (seen.length === 1) await sandbox.files.write('/tmp/seen', 'yes')
    },
  })
  assert.deepEqual(seen, ['line 1\n', 'line 2\n'])
  assert.equal(r.stdout, 'line 1\nline 2\n')
})

withSandbox('much output', async (sandbox) => {
  const r = await sandbox.commands.run('head -c 6000000 /dev/zero | tr "\\0" x')
  assert.equal(r.stdout.length, 6_000_000)
  const utf8 = await sandbox.commands.run('for i in $(seq 20000); do printf "ünï©ødé€"; done')
  assert.equal(utf8.stdout, 'ünï©ødé€'.repeat(20_000))
})

withSandbox('timeouts kill', async (sandbox) => {
  await assert.rejects(sandbox.commands.run('echo $$ > /tmp/pid; sleep 100', { timeoutMs: 1_000 }), TimeoutError)
  await until('the end of the command', async () => (await sandbox.commands.run('kill -0 $(cat /tmp/pid) 2>/dev/null || echo dead')).stdout === 'dead\n')
})

withSandbox('background, stdin, list, kill', async (sandbox) => {
  const cat = await sandbox.commands.run('cat; echo the end', { background: true, stdin: true })
  await sandbox.commands.sendStdin(cat.pid, 'first\n')
  await sandbox.commands.sendStdin(cat.pid, '')
  await sandbox.commands.sendStdin(cat.pid, 'second\n')
  await until('the echo', () => cat.stdout === 'first\nsecond\n')
  await sandbox.commands.closeStdin(cat.pid)
  const done = await cat.wait()
  assert.equal(done.stdout, 'first\nsecond\nthe end\n')

  const sleep = await sandbox.commands.run('sleep 300', { background: true })
  const listed = (await sandbox.commands.list()).find((p) => p.pid === sleep.pid)
  assert.ok(listed, 'the command is not listed')
  assert.ok([listed.cmd, ...listed.args].join(' ').includes('sleep 300'))
  assert.equal(await sleep.kill(), true)
  await assert.rejects(sandbox.commands.run(`kill -0 ${sleep.pid}`), CommandExitError)
  assert.equal(await sandbox.commands.kill(sleep.pid), false)
  await assert.rejects(sleep.wait(), CommandExitError)
  await assert.rejects(sandbox.commands.sendStdin(sleep.pid, 'x'))
})

withSandbox('disconnect and connect again', async (sandbox) => {
  const first = await sandbox.commands.run('i=0; while :; do echo tick $((i=i+1)); sleep 0.1; done', { background: true })
  await until('ticks', () => first.stdout.includes('tick 3\n'))
  await first.disconnect()
  const second = await sandbox.commands.connect(first.pid)
  await until('later ticks', () => /tick \d\d+\n/.test(second.stdout))
  assert.ok(!second.stdout.includes('tick 1\n'), 'the output from before was sent again')
  assert.equal(await second.kill(), true)
  const other = await Sandbox.connect(sandbox.sandboxId)
  assert.equal((await other.commands.run('echo shared')).stdout, 'shared\n')
})

withSandbox('many at once', async (sandbox) => {
  const all = await Promise.all(Array.from({ length: 40 }, (_, i) => sandbox.commands.run(`sleep 0.2; echo ${i}`, { timeoutMs: 300_000 })))
  assert.deepEqual(all.map((r) => r.stdout), Array.from({ length: 40 }, (_, i) => `${i}\n`))
})

test('kill in mid-stream', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 600_000 })
  const endless = await sandbox.commands.run('while :; do echo x; sleep 0.05; done', { background: true, timeoutMs: 0 })
  const ended = endless.wait().then(() => assert.fail('the command ended without an error'), (e) => e)
  await until('output', () => endless.stdout.length > 10)
  assert.equal(await sandbox.kill(), true)
  assert.equal(await sandbox.isRunning(), false)
  const e = await ended
  assert.ok(e instanceof TimeoutError, `${e.name}: ${e.message}`)
  assert.match(e.message, /killed|timeout|end of life/i)
})

// The template is the same for every version of the client.
if (newer(2, 51)) {
  withSandbox('the template base has what programs expect', async (sandbox) => {
    const out = async (command) => (await sandbox.commands.run(command, { timeoutMs: 300_000 })).stdout
    assert.match(await out('python --version && pip --version && python3 -m venv v && v/bin/pip --version'), /^Python 3.*\npip .*\npip .*\/user\/v\//)
    // pip installs outside a venv too, and fails for want of a package alone.
    assert.match(await out('pip install --no-index no-such-package 2>&1 || true'), /No matching distribution/)
    assert.match(await out('node -p 6*7 && npm --version && npx --version'), /^42\n[0-9.]+\n[0-9.]+\n$/)
    assert.equal(await out('printf \'#include <Python.h>\\n#include <cstdio>\\nint main() { puts(PY_MAJOR_VERSION == 3 ? "built" : "?"); }\' >a.cc && ' +
      'printf \'a: a.cc\\n\\tg++ $$(python3-config --includes) -o a a.cc\\n\' >Makefile && make -s && ./a && gcc --version >/dev/null'), 'built\n')
    assert.equal(await out('echo \'{"a": [1, 2]}\' | jq -c .a; rg -c include a.cc; sudo id -un; git --version >/dev/null; curl --version >/dev/null; ps -o comm= -p 1'),
      '[1,2]\n2\nroot\ncay-agent\n')
  })
}
