// Every method of the client that no other test calls, and what the server says to those that it does not have.
import { Sandbox, Secret, Volume, assert, newer, note, test, until, withSandbox } from './lib.mjs'

const once = newer(2, 51) ? withSandbox : () => {}
const bytes = (text) => new TextEncoder().encode(text)

once('methods of a sandbox', async (sandbox) => {
  const id = sandbox.sandboxId
  for (const info of [await Sandbox.getInfo(id), await Sandbox.getFullInfo(id)]) assert.equal(info.sandboxId, id)
  assert.ok(Array.isArray(await Sandbox.getMetrics(id)))
  await Sandbox.updateNetwork(id, { denyOut: ['0.0.0.0/0'] })
  await sandbox.updateNetwork({})
  assert.equal((await sandbox.connect({ timeoutMs: 60_000 })).sandboxId, id)
  assert.equal((await Sandbox.setTimeout(id, 90_000)), undefined)
  for (const children of [await sandbox.fork({ timeoutMs: 60_000 }), await Sandbox.fork(id, { timeoutMs: 60_000 })]) {
    assert.equal((await children[0].commands.run('echo child')).stdout, 'child\n')
    await children[0].kill()
  }
  const snapshot = await Sandbox.createSnapshot(id)
  assert.ok((await sandbox.listSnapshots().nextItems()).some((s) => s.snapshotId === snapshot.snapshotId))
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await sandbox.betaPause(), true)
  await sandbox.connect()
  assert.equal(await Sandbox.betaPause(id), true)
  await sandbox.connect()
  assert.equal(await Sandbox.pause(id), true)
  await sandbox.connect()

  await sandbox.files.writeFiles([{ path: 'one', data: '1' }, { path: 'two', data: '2' }])
  assert.equal(await sandbox.files.read('two'), '2')
  for (const close of [(c) => c.closeStdin(), (c) => sandbox.commands.closeStdin(c.pid)]) {
    const cat = await sandbox.commands.run('cat', { background: true, stdin: true })
    await cat.sendStdin('text')
    await close(cat)
    assert.equal((await cat.wait()).stdout, 'text')
  }
  const sleep = await sandbox.commands.run('sleep 1000', { background: true })
  await sleep.disconnect()
  assert.equal(await (await sandbox.commands.connect(sleep.pid)).kill(), true)
  const watcher = await sandbox.files.watchDir('.', () => {})
  await watcher.stop()
  const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData: () => {} })
  await sandbox.pty.sendInput(pty.pid, bytes('exit\n'))
  await pty.wait()
})

once('all of git', async (sandbox) => {
  const git = sandbox.git
  const [origin, repo, copy] = ['/home/user/origin.git', '/home/user/repo', '/home/user/copy']
  await git.init(origin, { bare: true, initialBranch: 'main' })
  await git.init(repo, { initialBranch: 'main' })
  await git.configureUser('A Person', 'person@example.com')
  await git.setConfig('pull.rebase', 'true', { scope: 'global' })
  assert.equal(await git.getConfig('pull.rebase', { scope: 'global' }), 'true')
  await sandbox.files.write(`${repo}/file`, 'text')
  await git.add(repo)
  await git.commit(repo, 'first')
  await git.remoteAdd(repo, 'origin', origin)
  assert.equal(await git.remoteGet(repo, 'origin'), origin)
  await git.push(repo, { remote: 'origin', branch: 'main' })
  await git.clone(origin, { path: copy })
  await git.createBranch(copy, 'side')
  await git.checkoutBranch(copy, 'main')
  await git.deleteBranch(copy, 'side')
  await sandbox.files.write(`${copy}/file`, 'changed')
  await git.restore(copy, { paths: ['file'] })
  assert.equal(await sandbox.files.read(`${copy}/file`), 'text')
  await git.reset(copy, { mode: 'hard' })
  await git.pull(copy)
  await git.dangerouslyAuthenticate({ username: 'u', password: 'p' })
})

once('what the server does not have', async (sandbox) => {
  for (const call of [
    () => Volume.create('v'), () => Volume.connect('v'), () => Volume.getInfo('v'), () => Volume.list(), () => Volume.destroy('v'),
  ]) await assert.rejects(call(), /501.*no volumes/)
  for (const call of [() => Secret.create('s', 'v'), () => Secret.update('s', 'v'), () => Secret.getInfo('s'), () => Secret.exists('s'), () => Secret.destroy('s')]) {
    await assert.rejects(call(), /501.*no secrets/)
  }
  const secrets = await Secret.list().nextItems().then(() => null, (e) => e)
  assert.match(secrets.message, /501.*no secrets/)
  note('Secret.list', secrets)
  // The MCP gateway's address is made without the server.
  assert.match(sandbox.getMcpUrl(), new RegExp(`^https://50005-${sandbox.sandboxId}\\.`))
  const answer = await fetch(process.env.E2B_SANDBOX_URL + '/mcp', { headers: { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': '50005' } })
  const { message } = await answer.json()
  assert.deepEqual([answer.status, /MCP gateway/.test(message)], [501, true])
  for (const name of ['sandbox.getMcpUrl', 'sandbox.getMcpToken']) note(name, { message: `501: ${message}` })
})

if (newer(2, 51)) {
  test('lists by every filter, in pages', async () => {
    const marked = { list: `${Date.now()}` }
    const all = []
    const before = new Date(Date.now() - 1000)
    for (let i = 0; i < 3; i++) all.push(await Sandbox.create({ timeoutMs: 60_000, metadata: { ...marked, n: `${i}` } }))
    const ids = all.map((s) => s.sandboxId)
    try {
      await all[1].pause()
      const list = async (query, more = {}) => {
        const found = []
        const pages = Sandbox.list({ query: { metadata: marked, ...query }, ...more })
        while (pages.hasNext) found.push(...await pages.nextItems())
        return found.map((s) => s.sandboxId)
      }
      for (const limit of [1, 2, 3, 100, undefined]) {
        assert.deepEqual(await list({}, { limit, order: 'asc' }), ids)
        assert.deepEqual(await list({}, { limit }), ids.toReversed())
        assert.deepEqual(await list({ state: ['running'] }, { limit, order: 'asc' }), [ids[0], ids[2]])
        assert.deepEqual(await list({ state: ['paused'] }, { limit }), [ids[1]])
        assert.deepEqual(await list({ state: ['running', 'paused'], template: 'base' }, { limit, order: 'asc' }), ids)
      }
      assert.deepEqual(await list({ metadata: { ...marked, n: '2' } }), [ids[2]])
      assert.deepEqual(await list({ startedAfter: before }, { order: 'asc' }), ids)
      assert.deepEqual(await list({ startedAfter: new Date(Date.now() + 60_000) }), [])
      assert.deepEqual(await list({ template: 'none' }), [])
      // A page can be taken up where another object left it.
      const first = Sandbox.list({ query: { metadata: marked }, limit: 2 })
      await first.nextItems()
      assert.deepEqual((await Sandbox.list({ query: { metadata: marked }, limit: 2, nextToken: first.nextToken }).nextItems()).map((s) => s.sandboxId), [ids[0]])
    } finally {
      for (const s of all) await s.kill()
    }
    await until('the end of the list', async () => (await Sandbox.list({ query: { metadata: marked } }).nextItems()).length === 0)
  })
}
