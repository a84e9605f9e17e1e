// What an evaluation harness such as Harbor asks of E2B, which is written in Python: a template from
// each task's Dockerfile, and then this in a sandbox of it.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { CommandExitError, Sandbox, Template } from 'e2b'
import { assert, test } from './lib.mjs'

test('harness: a task in a template of its own', async (t) => {
  const task = mkdtempSync(join(tmpdir(), 'cay-harness-'))
  t.after(() => rmSync(task, { recursive: true }))
  mkdirSync(join(task, 'data'))
  writeFileSync(join(task, 'Dockerfile'), 'FROM python\nWORKDIR /app\nCOPY data/numbers.txt ./\nRUN sort -n numbers.txt > sorted\n')
  writeFileSync(join(task, 'data/numbers.txt'), '7\n6\n')

  const name = 'terminal-bench__hello-world__1a2b3c4d'
  assert.equal(await Template.exists(name), false)
  await Template.build(Template({ fileContextPath: task }).fromDockerfile(join(task, 'Dockerfile')), name,
    { cpuCount: 1, memoryMB: 512 })
  assert.equal(await Template.exists(name), true)

  const sandbox = await Sandbox.create(name, { timeoutMs: 24 * 3600_000, allowInternetAccess: false,
    metadata: { environment_name: 'hello-world', session_id: 'hello-world__AbC' } })
  try {
    // exec runs a command as the harness does: in the background, as root, without a limit of time.
    const exec = async (command, options = {}) => {
      const handle = await sandbox.commands.run(command, { background: true, cwd: '/app', timeoutMs: 0, user: 'root', ...options })
      return handle.wait().catch((error) => {
        if (error instanceof CommandExitError) return error
        throw error
      })
    }
    await sandbox.files.makeDir('/logs/agent')
    await sandbox.files.makeDir('/logs/verifier')
    assert.equal((await exec('chmod 777 /logs/agent /logs/verifier')).exitCode, 0)
    assert.equal((await exec('cat sorted; id -un; pwd')).stdout, '6\n7\nroot\n/app\n')
    const failed = await exec('echo $NAME >&2; exit 7', { envs: { NAME: 'x y' }, user: 'user' })
    assert.deepEqual([failed.exitCode, failed.stderr], [7, 'x y\n'])

    const tests = Array.from({ length: 45 }, (_, i) => ({ path: `/tests/deep/${i}.txt`, data: new Blob([`${i}`]) }))
    for (let i = 0; i < tests.length; i += 20) await sandbox.files.write(tests.slice(i, i + 20))
    assert.equal((await sandbox.files.list('/tests/deep')).length, 45)
    assert.deepEqual((await sandbox.files.list('/tests')).map((e) => [e.type, e.path]), [['dir', '/tests/deep']])
    assert.equal((await sandbox.files.getInfo('/tests/deep/44.txt')).type, 'file')
    await exec('echo 1 > /logs/verifier/reward.txt')
    assert.equal(Buffer.from(await sandbox.files.read('/logs/verifier/reward.txt', { format: 'bytes' })).toString(), '1\n')
    assert.equal((await sandbox.getInfo()).allowInternetAccess, false)
  } finally {
    await sandbox.kill()
  }
})
