import { Sandbox, NotFoundError, assert, test, withSandbox, until, control } from './lib.mjs'

withSandbox('fork', { envs: { KEPT: 'yes' }, metadata: { family: 'parent' } }, async (sandbox) => {
  if (!sandbox.fork) return
  await sandbox.files.write('note', 'of the parent')
  const counter = await sandbox.commands.run('i=0; while :; do echo $((i=i+1)) > /tmp/count; sleep 0.1; done', { background: true, timeoutMs: 0 })
  const children = await sandbox.fork({ count: 3 })
  try {
    assert.equal(children.length, 3)
    for (const child of children) {
      assert.ok(child instanceof Sandbox, `${child}`)
      assert.notEqual(child.sandboxId, sandbox.sandboxId)
      assert.equal(await child.files.read('note'), 'of the parent')
      assert.equal((await child.commands.run('echo $KEPT')).stdout, 'yes\n')
      assert.ok((await child.commands.list()).some((p) => p.pid === counter.pid))
    }
    await children[0].files.write('note', 'changed')
    assert.equal(await sandbox.files.read('note'), 'of the parent')
    assert.equal(await children[1].files.read('note'), 'of the parent')
    // The command goes on in the child and in the parent.
    for (const s of [sandbox, children[2]]) {
      const before = Number((await s.commands.run('cat /tmp/count')).stdout)
      await until('it counts on', async () => Number((await s.commands.run('cat /tmp/count')).stdout) > before)
    }
    // The token of one sandbox does not open the others.
    const stolen = await fetch(process.env.E2B_SANDBOX_URL + '/files?path=note', { headers: { 'E2b-Sandbox-Id': children[0].sandboxId, 'E2b-Sandbox-Port': '49983',
      'X-Access-Token': (await control('GET', `/sandboxes/${sandbox.sandboxId}`)).body.envdAccessToken } })
    assert.equal(stolen.status, 401)
  } finally {
    await Promise.all(children.map((c) => c.kill?.()))
  }
  for (const wrong of [0, 101]) assert.equal((await control('POST', `/sandboxes/${sandbox.sandboxId}/fork`, { count: wrong })).status, 400)
  await sandbox.pause()
  assert.equal((await control('POST', `/sandboxes/${sandbox.sandboxId}/fork`, {})).status, 409)
  assert.equal((await control('POST', '/sandboxes/nosuchsandbox/fork', {})).status, 404)
})

withSandbox('snapshots', { envs: { KEPT: 'yes' } }, async (sandbox) => {
  await sandbox.files.write('note', 'kept in a snapshot')
  const name = `snap-${process.pid}`
  const snapshot = await sandbox.createSnapshot({ name })
  const plain = await sandbox.createSnapshot()
  try {
    assert.ok(snapshot.names.some((n) => n.includes(name)), `${snapshot.names}`)
    await sandbox.files.write('note', 'later')
    for (const ref of [snapshot.snapshotId, name]) {
      const again = await Sandbox.create(ref, { timeoutMs: 60_000 })
      try {
        assert.equal(await again.files.read('note'), 'kept in a snapshot')
        assert.equal((await again.commands.run('echo $KEPT; whoami')).stdout, 'yes\nuser\n')
      } finally {
        await again.kill()
      }
    }
    const listed = []
    for (const pages = Sandbox.listSnapshots({ sandboxId: sandbox.sandboxId, limit: 1 }); pages.hasNext;) listed.push(...await pages.nextItems())
    assert.deepEqual(listed.map((s) => s.snapshotId), [plain.snapshotId, snapshot.snapshotId])
    assert.deepEqual((await control('GET', '/snapshots?name=no-such-name')).body, [])
    assert.deepEqual((await control('GET', `/snapshots?name=${name}`)).body.map((s) => s.snapshotID), [snapshot.snapshotId])
  } finally {
    for (const s of [snapshot, plain]) assert.equal(await Sandbox.deleteSnapshot(s.snapshotId), true)
  }
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
  assert.equal((await control('DELETE', '/templates/base')).status, 403)
  assert.equal((await control('DELETE', '/templates/some%2Fname%3Adefault')).status, 404)
  await assert.rejects(Sandbox.create(snapshot.snapshotId))
})
