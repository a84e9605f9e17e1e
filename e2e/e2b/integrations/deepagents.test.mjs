// The backend for Deep Agents that docs/integrations.md shows.
import { Sandbox } from 'e2b'
import { E2BBackend } from './e2b-backend.mjs'
import { assert, test } from './lib.mjs'

test('deepagents: commands and files', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 120_000 })
  try {
    const backend = new E2BBackend(sandbox)
    assert.deepEqual(await backend.execute('echo out; echo err >&2; exit 3'), { output: 'out\nerr\n', exitCode: 3, truncated: false })
    assert.ok(!(await backend.write('/home/user/work/a.txt', 'one\ntwo\n')).error)
    assert.ok(!(await backend.write('/home/user/work/b.md', 'three\n')).error)
    assert.ok(!(await backend.edit('/home/user/work/a.txt', 'two', '2')).error)
    assert.match((await backend.read('/home/user/work/a.txt')).content, /one\n.*2/)
    assert.deepEqual((await backend.ls('/home/user/work')).files.map((f) => f.path).sort(),
      ['/home/user/work/a.txt', '/home/user/work/b.md'])
    assert.deepEqual((await backend.glob('*.md', '/home/user/work')).files.map((f) => f.path), ['b.md'])
    assert.deepEqual((await backend.grep('three', '/home/user/work')).matches,
      [{ path: '/home/user/work/b.md', line: 1, text: 'three' }])
    const [found, missing] = await backend.downloadFiles(['/home/user/work/b.md', '/home/user/work/c.md'])
    assert.equal(Buffer.from(found.content).toString(), 'three\n')
    assert.equal(missing.error, 'file_not_found')
    const bytes = new Uint8Array(100_000).map((_, i) => i)
    await backend.uploadFiles([['/home/user/work/data.bin', bytes]])
    assert.deepEqual(await sandbox.files.read('/home/user/work/data.bin', { format: 'bytes' }), bytes)
  } finally {
    await sandbox.kill()
  }
})
