// Mastra's sandbox, with the template that it builds itself.
import { E2BSandbox } from '@mastra/e2b'
import { Sandbox, Template } from 'e2b'
import { assert, get, test, until } from './lib.mjs'

const start = async (sandbox) => {
  await sandbox._start()
  return sandbox
}

test('mastra: template, commands, processes, stop and start', async () => {
  const sandbox = await start(new E2BSandbox({ id: 'cay-mastra', env: { COLOR: 'blue' }, timeout: 120_000 }))
  try {
    // The template was built at the first start, and has what it is for.
    const { templateId } = await sandbox.e2b.getInfo()
    assert.ok(templateId)
    const tools = await sandbox.executeCommand('sh', ['-c', 'command -v s3fs; command -v fusermount; echo $COLOR; id -un'])
    assert.equal(tools.stdout, '/usr/bin/s3fs\n/usr/bin/fusermount\nblue\nuser\n')
    assert.notEqual((await sandbox.executeCommand('test', ['-e', '/dev/fuse'])).exitCode, 0) // so no bucket can be mounted
    const failed = await sandbox.executeCommand('sh', ['-c', 'echo out; echo err >&2; exit 3'])
    assert.equal(failed.exitCode, 3)
    assert.match(failed.stdout, /^out\n/) // Mastra repeats the output of a command that fails
    assert.match(failed.stderr, /^err\n/)

    await sandbox.writeFiles([{ path: '/home/user/a/b.txt', content: 'b' }, { path: 'c.bin', content: Buffer.from([0, 255]) }])
    assert.equal((await sandbox.executeCommand('cat', ['a/b.txt'])).stdout, 'b')
    assert.deepEqual(await sandbox.e2b.files.read('c.bin', { format: 'bytes' }), new Uint8Array([0, 255]))

    const echo = await sandbox.processes.spawn('cat')
    await echo.sendStdin('hello\n')
    await until('the echo', () => echo.stdout === 'hello\n')
    assert.ok((await sandbox.processes.list()).some((p) => p.pid === echo.pid))
    assert.equal(await echo.kill(), true)

    const server = await sandbox.processes.spawn('python3 -m http.server 8000')
    const url = new URL(await sandbox.networking.getPortUrl(8000))
    await until('the port', async () => (await get(url.host, '/a/b.txt')).body === 'b')

    // A stop pauses, and a start of another object with the same id resumes.
    const { sandboxId } = sandbox.e2b
    await sandbox._stop()
    assert.equal((await Sandbox.getInfo(sandboxId)).state, 'paused')
    const again = await start(new E2BSandbox({ id: 'cay-mastra', timeout: 120_000 }))
    assert.equal(again.e2b.sandboxId, sandboxId)
    assert.equal((await again.executeCommand('cat', ['a/b.txt'])).stdout, 'b')
    assert.ok((await again.processes.list()).some((p) => p.pid === server.pid))
    await again._destroy()
    assert.equal(await Sandbox.kill(sandboxId), false)
  } finally {
    await sandbox._destroy()
  }
})

test('mastra: a template of one\'s own', async () => {
  const sandbox = await start(new E2BSandbox({ id: 'cay.own', template: Template().fromTemplate('python').runCmd('echo 42 > answer') }))
  try {
    assert.equal((await sandbox.executeCommand('cat', ['answer'])).stdout, '42\n')
  } finally {
    await sandbox._destroy()
  }
})
