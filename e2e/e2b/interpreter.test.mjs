import { Sandbox } from '@e2b/code-interpreter'
import { assert, test } from './lib.mjs'

// All tests share one sandbox, because its kernels take a moment to start.
test('code interpreter', { timeout: 900_000 }, async (t) => {
  const sandbox = await Sandbox.create({ timeoutMs: 900_000, envs: { FROM: 'create' }, requestTimeoutMs: 120_000 })
  try {
    await t.test('results, text and state', async () => {
      const lines = []
      const first = await sandbox.runCode('x = 40\nprint("printed")\nimport sys; print("wrong", file=sys.stderr)\nx + 2', {
        onStdout: (m) => lines.push(m.line),
      })
      assert.equal(first.text, '42')
      assert.equal(first.logs.stdout.join(''), 'printed\n')
      assert.equal(first.logs.stderr.join(''), 'wrong\n')
      assert.ok(lines.join('').includes('printed'))
      assert.equal((await sandbox.runCode('x += 1; x')).text, '41')
      assert.equal(first.error, undefined)
    })
    await t.test('errors', async () => {
      const r = await sandbox.runCode('def f():\n    return 1 / 0\nf()')
      assert.equal(r.error.name, 'ZeroDivisionError')
      assert.match(r.error.value, /division by zero/)
      assert.match(r.error.traceback, /ZeroDivisionError/)
    })
    await t.test('variables', async () => {
      const r = await sandbox.runCode('import os; os.environ.get("FROM"), os.environ.get("CALL")', { envs: { CALL: 'call' } })
      assert.equal(r.text, "('create', 'call')")
    })
    await t.test('images and charts', async () => {
      const r = await sandbox.runCode('import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [4, 5, 6], label="a line")\nplt.title("a title")\nplt.show()', { timeoutMs: 120_000 })
      const picture = r.results.find((x) => x.png)
      assert.ok(picture, JSON.stringify(r))
      assert.equal(Buffer.from(picture.png, 'base64').subarray(1, 4).toString(), 'PNG')
      assert.equal(picture.chart?.type, 'line')
      assert.equal(picture.chart?.title, 'a title')
    })
    await t.test('tables', async () => {
      const r = await sandbox.runCode('import pandas as pd\npd.DataFrame({"a": [1, 2], "b": ["x", "y"]})', { timeoutMs: 120_000 })
      assert.match(r.results[0].html, /<table/)
      assert.ok(r.results[0].data, JSON.stringify(r.results[0]))
    })
    await t.test('contexts', async () => {
      const context = await sandbox.createCodeContext({ cwd: '/tmp' })
      assert.equal((await sandbox.runCode('import os; os.getcwd()', { context })).text, '/tmp')
      assert.equal((await sandbox.runCode('x', { context })).error.name, 'NameError')
      assert.equal((await sandbox.runCode('x')).text, '41')
      assert.ok((await sandbox.listCodeContexts()).some((c) => c.id === context.id))
      await sandbox.restartCodeContext(context)
      await sandbox.removeCodeContext(context)
      assert.ok(!(await sandbox.listCodeContexts()).some((c) => c.id === context.id))
    })
    await t.test('a pause keeps the state', async () => {
      assert.equal(await sandbox.pause(), true)
      const again = await Sandbox.connect(sandbox.sandboxId)
      assert.equal((await again.runCode('x')).text, '41')
    })
    await t.test('the rest of a sandbox is there too', async () => {
      assert.equal((await sandbox.commands.run('whoami')).stdout, 'user\n')
      await sandbox.files.write('data.csv', 'a\n1\n')
      assert.equal((await sandbox.runCode('open("/home/user/data.csv").read()')).text.includes('a'), true)
    })
  } finally {
    await sandbox.kill()
  }
})
