import { Sandbox, NotFoundError, SandboxNotFoundError, AuthenticationError, SandboxError, assert, test, withSandbox, until, control, newer } from './lib.mjs'

test('create, info, kill', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 60_000, metadata: { purpose: 'info' } })
  assert.match(sandbox.sandboxId, /^[a-z0-9]{20}$/)
  assert.equal(await sandbox.isRunning(), true)
  const info = await sandbox.getInfo()
  assert.equal(info.sandboxId, sandbox.sandboxId)
  assert.equal(info.name, 'base')
  assert.equal(info.state, 'running')
  assert.deepEqual(info.metadata, { purpose: 'info' })
  assert.deepEqual(info.lifecycle, { onTimeout: 'kill', autoResume: false })
  const left = info.endAt - Date.now()
  assert.ok(left > 40_000 && left <= 61_000, `ends in ${left} ms`)
  assert.ok(info.cpuCount >= 1 && info.memoryMB >= 256)
  assert.equal(await sandbox.kill(), true)
  assert.equal(await sandbox.kill(), false)
  assert.equal(await Sandbox.kill(sandbox.sandboxId), false)
  assert.equal(await sandbox.isRunning(), false)
  await assert.rejects(sandbox.getInfo(), NotFoundError)
  await assert.rejects(Sandbox.connect(sandbox.sandboxId), NotFoundError)
})

test('a sandbox that never was', async () => {
  const id = 'ionlyexistinthistest'
  assert.equal(await Sandbox.kill(id), false)
  await assert.rejects(Sandbox.getInfo(id), NotFoundError)
  await assert.rejects(Sandbox.setTimeout(id, 10_000), NotFoundError)
  await assert.rejects(Sandbox.pause(id), NotFoundError)
  await assert.rejects(Sandbox.connect(id), NotFoundError)
})

test('refusals', async () => {
  await assert.rejects(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), AuthenticationError)
  await assert.rejects(Sandbox.create('no-such-template'), SandboxError)
  await assert.rejects(Sandbox.create({ timeoutMs: 25 * 3600_000 }), /24 hours/)
  await assert.rejects(Sandbox.create({ envs: { '1A': 'x' } }), /envVars\.1A/)
  for (const [path, body, status] of [
    ['/v2/sandboxes', { templateID: 'base', iam: { tokens: {} } }, 400],
    ['/v2/sandboxes', { templateID: 'base', volumeMounts: [{ name: 'a', path: '/b' }] }, 400],
    ['/v2/sandboxes', { templateID: 'base', network: { httpsPorts: [443] } }, 501],
    ['/v2/sandboxes', { templateID: 'base', network: { egressProxy: { address: '1.2.3.4:80' } } }, 501],
    ['/v2/sandboxes', { templateID: 'base', network: { allowOut: ['example.com'] } }, 400],
    ['/v2/sandboxes', { templateID: 'base', network: { denyOut: ['300.0.0.0'] } }, 400],
    ['/v2/sandboxes', { templateID: 'base', ofTheFuture: 1 }, 501],
    ['/v2/sandboxes', { templateID: 'base:v9' }, 404],
    ['/v2/sandboxes', { templateID: 'base', timeout: 0 }, 400],
    ['/v2/sandboxes', { templateID: 7 }, 400],
    ['/v3/templates', {}, 400],
    ['/v2/templates', { dockerfile: 'FROM base' }, 501],
    ['/volumes', { name: 'v' }, 501],
    ['/secrets', {}, 501],
    ['/v2/no-such-thing', {}, 404],
  ]) {
    const r = await control('POST', path, body)
    assert.equal(r.status, status, `${path} ${JSON.stringify(body)}: ${r.status} ${JSON.stringify(r.body)}`)
    assert.equal(r.body.code, status)
    assert.ok(r.body.message)
  }
})

withSandbox('timeouts', { timeoutMs: 60_000 }, async (sandbox) => {
  const end = async () => (await sandbox.getInfo()).endAt.getTime() - Date.now()
  await sandbox.setTimeout(300_000)
  assert.ok((await end()) > 250_000)
  await sandbox.setTimeout(30_000)
  assert.ok((await end()) < 31_000)
  // connect never shortens the time that is left, and extends a shorter one.
  const before = (await sandbox.getInfo()).endAt.getTime()
  await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 5_000 })
  assert.equal((await sandbox.getInfo()).endAt.getTime(), before)
  await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 200_000 })
  assert.ok((await end()) > 150_000)
  await sandbox.setTimeout(1_000)
  await until('its end', async () => !(await sandbox.isRunning()))
  await assert.rejects(sandbox.setTimeout(1_000), NotFoundError)
})

test('a timeout that is over at once', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 60_000 })
  await sandbox.setTimeout(0)
  await until('its end', async () => !(await sandbox.isRunning()))
})

test('what the versions leave out', async () => {
  const one = await control('POST', '/sandboxes', { templateID: 'base' })
  const two = await control('POST', '/v2/sandboxes', { templateID: 'base' })
  assert.deepEqual([one.status, two.status], [201, 201])
  assert.equal(one.body.envdAccessToken, undefined, 'v1 without secure has no token')
  assert.ok(two.body.envdAccessToken)
  const [left1, left2] = await Promise.all([one, two].map(async (r) => {
    const info = await control('GET', `/sandboxes/${r.body.sandboxID}`)
    return new Date(info.body.endAt) - new Date(info.body.startedAt)
  }))
  assert.ok(left1 < 120_000 && left2 > 250_000, `${left1}, ${left2}`)
  for (const r of [one, two]) assert.equal((await control('DELETE', `/sandboxes/${r.body.sandboxID}`)).status, 204)
})

test('a sandbox without a token is open', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 60_000, secure: false })
  try {
    if (newer(2, 51)) return // since 2.51 a sandbox is always secure
    assert.equal((await sandbox.commands.run('echo open')).stdout, 'open\n')
  } finally {
    await sandbox.kill()
  }
})

test('list and paging', async () => {
  const mark = { run: `${process.pid}-${Date.now()}`, 'a b': 'ü&=%' }
  const began = new Date(Date.now() - 2_000)
  const made = []
  for (let i = 0; i < 3; i++) made.push(await Sandbox.create({ timeoutMs: 60_000, metadata: { ...mark, n: `${i}` } }))
  const ids = made.map((s) => s.sandboxId)
  const all = async (query, limit) => {
    const pages = Sandbox.list({ query, limit })
    const seen = []
    while (pages.hasNext) {
      const page = await pages.nextItems()
      if (limit) assert.ok(page.length <= limit && page.length > 0 || seen.length === 0, `a page of ${page.length}`)
      seen.push(...page)
    }
    return seen.map((s) => s.sandboxId)
  }
  try {
    assert.deepEqual(await all({ metadata: mark }), ids.toReversed())
    assert.deepEqual(await all({ metadata: mark }, 1), ids.toReversed())
    assert.deepEqual(await all({ metadata: mark }, 3), ids.toReversed())
    assert.deepEqual(await all({ metadata: { ...mark, n: '1' } }), [ids[1]])
    assert.deepEqual(await all({ metadata: { ...mark, n: '9' } }), [])
    const again = await control('GET', `/v2/sandboxes?order=asc&limit=2&metadata=${encodeURIComponent(`run=${mark.run}`)}`)
    assert.deepEqual(again.body.map((s) => s.sandboxID), ids.slice(0, 2))
    const rest = await control('GET', `/v2/sandboxes?order=asc&limit=2&metadata=${encodeURIComponent(`run=${mark.run}`)}&nextToken=${again.headers.get('x-next-token')}`)
    assert.deepEqual(rest.body.map((s) => s.sandboxID), ids.slice(2))
    assert.equal(rest.headers.get('x-next-token'), null)
    for (const [more, want] of [
      [`startedAfter=${began.toISOString()}`, 3], [`startedAfter=${new Date(Date.now() + 5_000).toISOString()}`, 0],
      ['template=base', 3], ['template=python', 0], ['template=no-such', 0], ['state=running', 3], ['state=paused', 0],
    ]) {
      const r = await control('GET', `/v2/sandboxes?metadata=${encodeURIComponent(`run=${mark.run}`)}&${more}`)
      assert.equal(r.body.length, want, `${more}: ${JSON.stringify(r.body)}`)
    }
    for (const wrong of ['limit=0', 'limit=101', 'state=dead', 'order=up', 'nextToken=x', 'startedAfter=now']) {
      assert.equal((await control('GET', `/v2/sandboxes?${wrong}`)).status, 400, wrong)
    }
    // A paused sandbox keeps its place in the list, and is found by its state.
    await made[1].pause()
    assert.deepEqual(await all({ metadata: mark }), ids.toReversed())
    assert.deepEqual(await all({ metadata: mark, state: ['paused'] }), [ids[1]])
    assert.deepEqual(await all({ metadata: mark, state: ['running'] }), [ids[2], ids[0]])
  } finally {
    await Promise.all(made.map((s) => s.kill()))
  }
  assert.deepEqual(await all({ metadata: mark }), [])
})

withSandbox('metrics and logs', async (sandbox) => {
  await sandbox.commands.run('dd if=/dev/zero of=/home/user/file bs=1M count=64 2>/dev/null; timeout 8 sh -c "while :; do :; done" || true', { timeoutMs: 30_000 })
  const metrics = await until('a sample', async () => {
    const all = await sandbox.getMetrics()
    return all.length > 0 && all
  })
  const m = metrics.at(-1)
  assert.equal(m.cpuCount, (await sandbox.getInfo()).cpuCount)
  assert.ok(m.cpuUsedPct >= 0 && m.cpuUsedPct <= 100, JSON.stringify(m))
  assert.ok(m.memTotal >= 256 << 20 && m.memUsed > 0 && m.memUsed < m.memTotal, JSON.stringify(m))
  assert.ok(m.diskTotal > 512 << 20 && m.diskUsed > 0 && m.diskUsed < m.diskTotal, JSON.stringify(m))
  assert.deepEqual(await sandbox.getMetrics({ start: new Date(Date.now() - 3600_000), end: new Date(Date.now() - 3500_000) }), [])
  const several = await control('GET', `/sandboxes/metrics?sandbox_ids=${sandbox.sandboxId},nosuchsandbox`)
  assert.deepEqual(Object.keys(several.body.sandboxes), [sandbox.sandboxId])
  const logs = await control('GET', `/v2/sandboxes/${sandbox.sandboxId}/logs`)
  assert.ok(logs.body.logs.some((l) => l.fields.state === 'running'), JSON.stringify(logs.body))
  const lines = (await control('GET', `/sandboxes/${sandbox.sandboxId}/logs`)).body.logs.map((l) => JSON.parse(l.line))
  assert.ok(lines.length > 0 && lines.every((l) => l.level && l.message && l.logger), JSON.stringify(lines))
})
