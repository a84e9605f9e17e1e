import { Sandbox, NotFoundError, SandboxNotFoundError, assert, test, until, control } from './lib.mjs'

test('pause and resume', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 120_000, envs: { KEPT: 'yes' } })
  try {
    await sandbox.files.write('note', 'remember')
    const sleep = await sandbox.commands.run('sleep 3600', { background: true })
    const counter = await sandbox.commands.run('i=0; while :; do echo $((i=i+1)) > /tmp/count; sleep 0.1; done', { background: true, timeoutMs: 0 })
    const broken = counter.wait().then(() => assert.fail('the command ended without an error'), (e) => e)
    assert.equal(await sandbox.pause(), true)
    assert.ok((await broken) instanceof Error)
    assert.equal(await sandbox.isRunning(), false)
    assert.equal((await sandbox.getInfo()).state, 'paused')
    assert.equal(await sandbox.pause(), false)
    await assert.rejects(sandbox.commands.run('true'), SandboxNotFoundError)
    await assert.rejects(sandbox.setTimeout(10_000), NotFoundError)

    const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 60_000 })
    assert.equal(again.sandboxId, sandbox.sandboxId)
    const info = await again.getInfo()
    assert.equal(info.state, 'running')
    const left = info.endAt - Date.now()
    assert.ok(left > 30_000 && left <= 61_000, `ends in ${left} ms`)
    // The first client object has the same token.
    assert.equal((await sandbox.commands.run('echo $KEPT')).stdout, 'yes\n')
    assert.equal(await again.files.read('note'), 'remember')
    assert.ok((await again.commands.list()).some((p) => p.pid === sleep.pid), 'the command is not listed any more')
    const count = Number((await again.commands.run('cat /tmp/count')).stdout)
    await until('a higher count', async () => Number((await again.commands.run('cat /tmp/count')).stdout) > count)
    const attached = await again.commands.connect(sleep.pid)
    assert.equal(await attached.kill(), true)

    // It is paused twice, and killed while it is paused.
    assert.equal(await again.pause(), true)
    const states = await control('POST', `/sandboxes/${sandbox.sandboxId}/pause`, {})
    assert.deepEqual([states.status, states.body.code], [409, 409])
  } finally {
    assert.equal(await sandbox.kill(), true)
  }
  await assert.rejects(Sandbox.connect(sandbox.sandboxId), NotFoundError)
})

test('what connect answers', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 60_000 })
  const path = `/v2/sandboxes/${sandbox.sandboxId}/connect`
  try {
    assert.equal((await control('POST', path, {})).status, 200)
    assert.equal(await sandbox.pause(), true)
    assert.equal((await control('POST', path, { memory: false })).status, 501)
    assert.equal((await control('POST', path, {})).status, 201)
    assert.equal((await control('POST', `/sandboxes/${sandbox.sandboxId}/pause`, { memory: false })).status, 501)
    assert.equal((await control('POST', `/sandboxes/${sandbox.sandboxId}/resume`, {})).status, 409)
  } finally {
    await sandbox.kill()
  }
})

test('many connect to one that is paused', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 60_000 })
  try {
    await sandbox.pause()
    const all = await Promise.all(Array.from({ length: 8 }, () => Sandbox.connect(sandbox.sandboxId, { timeoutMs: 60_000 })))
    for (const s of all) assert.equal((await s.commands.run('echo here')).stdout, 'here\n')
  } finally {
    await sandbox.kill()
  }
})

test('the end of its time pauses it', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 3_000, lifecycle: { onTimeout: 'pause' } })
  try {
    assert.deepEqual((await sandbox.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: false })
    await until('the pause', async () => (await sandbox.getInfo()).state === 'paused', 15_000)
    assert.equal(await sandbox.isRunning(), false)
    await assert.rejects(sandbox.commands.run('true'), SandboxNotFoundError)
    assert.equal((await sandbox.getInfo()).state, 'paused')
    const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 30_000 })
    assert.equal((await again.commands.run('echo back')).stdout, 'back\n')
    await again.setTimeout(0)
    await until('the pause at once', async () => (await again.getInfo()).state === 'paused', 15_000)
  } finally {
    assert.equal(await sandbox.kill(), true)
  }
})

test('traffic wakes it', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 60_000, lifecycle: { onTimeout: 'pause', autoResume: true } })
  try {
    assert.deepEqual((await sandbox.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: true })
    await sandbox.pause()
    assert.equal(await sandbox.isRunning(), false)
    assert.equal((await sandbox.getInfo()).state, 'paused', 'isRunning has woken it')
    const wrong = await fetch(process.env.E2B_SANDBOX_URL + '/files?path=x', { headers: { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': '49983', 'X-Access-Token': 'wrong' } })
    assert.equal(wrong.status, 401)
    assert.equal((await sandbox.getInfo()).state, 'paused', 'a request with a wrong token has woken it')
    assert.equal((await sandbox.commands.run('echo awake')).stdout, 'awake\n')
    assert.equal((await sandbox.getInfo()).state, 'running')
  } finally {
    await sandbox.kill()
  }
})
