// ComputeSDK with its provider for E2B.
import { e2b } from '@computesdk/e2b'
import { compute } from 'computesdk'
import { assert, get, test, until } from './lib.mjs'
import { timeToInteractive } from './tti.mjs'

test('computesdk: sandboxes, commands, files, ports and snapshots', async () => {
  compute.setConfig({ provider: e2b({}) })
  const sandbox = await compute.sandbox.create({ envs: { COLOR: 'blue' }, metadata: { a: 'b' }, timeout: 120_000 })
  try {
    const result = await sandbox.runCommand('echo $COLOR $MORE; pwd; exit 3', { env: { MORE: 'red' }, cwd: '/tmp' })
    assert.equal(result.exitCode, 3)
    assert.match(result.stdout, /blue.*\n\/tmp\n/)
    const missing = await sandbox.runCommand('no-such-program')
    assert.equal(missing.exitCode, 127)

    const files = sandbox.filesystem
    await files.mkdir('/home/user/site')
    await files.writeFile('/home/user/site/a.txt', 'a\n')
    assert.equal(await files.readFile('/home/user/site/a.txt'), 'a\n')
    assert.deepEqual((await files.readdir('/home/user/site')).map((f) => f.name), ['a.txt'])
    assert.equal(await files.exists('/home/user/site/b.txt'), false)

    await sandbox.runCommand('python3 -m http.server 8000 -d /home/user/site', { background: true })
    const url = new URL(await sandbox.getUrl({ port: 8000 }))
    await until('the port', async () => (await get(url.host, '/a.txt')).body === 'a\n')

    const snapshot = await compute.snapshot.create(sandbox.sandboxId, { name: 'compute' })
    const copy = await compute.sandbox.create({ snapshotId: snapshot.id })
    assert.equal(await copy.filesystem.readFile('/home/user/site/a.txt'), 'a\n')
    await copy.destroy()

    await files.remove('/home/user/site/a.txt')
    assert.equal(await files.exists('/home/user/site/a.txt'), false)
    assert.ok((await compute.sandbox.list()).some((s) => s.sandboxId === sandbox.sandboxId))
    assert.ok(await compute.sandbox.getById(sandbox.sandboxId))
  } finally {
    await sandbox.destroy()
  }
  assert.equal(await compute.sandbox.getById(sandbox.sandboxId), null)
})

test('computesdk: time to interactive', async () => {
  const times = await timeToInteractive(2)
  assert.ok(times.length === 2 && times.every((ms) => ms > 0), times)
})
