import { Sandbox, NotFoundError, SandboxNotFoundError, assert, test, until, control, newer } from './lib.mjs'

test('pause and resume', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 600_000, envs: { KEPT: 'yes' } })
  try {
    await sandbox.files.write('note', 'remember')
    const sleep = await sandbox.commands.run('sleep 3600', { background: true, timeoutMs: 0 })
    const counter = await sandbox.commands.run('i=0; while :; do echo $((i=i+1)) > /tmp/count; sleep 0.1; done', { background: true, timeoutMs: 0 })
    const broken = counter.wait().then(() => assert.fail('the command ended without an error'), (e) => e)
    assert.equal(await sandbox.pause(), true)
    assert.ok((await broken) instanceof Error)
    assert.equal(await sandbox.isRunning(), false)
    assert.equal((await sandbox.getInfo()).state, 'paused')
    assert.equal(await sandbox.pause(), false)
    await assert.rejects(sandbox.commands.run('true'), SandboxNotFoundError)
    await assert.rejects(sandbox.setTimeout(10_000), NotFoundError)

    const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 600_000 })
    assert.equal(again.sandboxId, sandbox.sandboxId)
    const info = await again.getInfo()
    assert.equal(info.state, 'running')
    const left = info.endAt - Date.now()
    assert.ok(left > 500_000 && left <= 601_000, `ends in ${left} ms`)
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
    assert.equal((await control('POST', path, {})).status, 201)
    assert.equal((await control('POST', `/sandboxes/${sandbox.sandboxId}/resume`, {})).status, 409)
  } finally {
    await sandbox.kill()
  }
})

test('many connect to one that is paused', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 60_000 })
  try {
    await sandbox.pause()
    const all = await Promise.all(Array.from({ length: 8 }, () => Sandbox.connect(sandbox.sandboxId, { timeoutMs: 600_000 })))
    for (const s of all) assert.equal((await s.commands.run('echo here')).stdout, 'here\n')
  } finally {
    await sandbox.kill()
  }
})

test('the end of its time pauses it', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 3_000, lifecycle: { onTimeout: 'pause' } })
  try {
    assert.deepEqual((await sandbox.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: false })
    await until('the pause', async () => (await sandbox.getInfo()).state === 'paused')
    assert.equal(await sandbox.isRunning(), false)
    await assert.rejects(sandbox.commands.run('true'), SandboxNotFoundError)
    assert.equal((await sandbox.getInfo()).state, 'paused')
    const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 30_000 })
    assert.equal((await again.commands.run('echo back')).stdout, 'back\n')
    await again.setTimeout(0)
    await until('the pause at once', async () => (await again.getInfo()).state === 'paused')
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

// state returns the boot and what programs made of a sandbox.
async function state(sandbox) {
  const { stdout } = await sandbox.commands.run('cat /proc/sys/kernel/random/boot_id; cat note; pgrep -c sleep; echo $KEPT; whoami; pwd')
  const [boot, note, sleeps, kept, user, dir] = stdout.trim().split('\n')
  return { boot, note, sleeps, kept, user, dir }
}

test('a pause without memory', async () => {
  const sandbox = await Sandbox.create({ timeoutMs: 600_000, envs: { KEPT: 'yes' }, lifecycle: { onTimeout: 'pause', autoResume: true } })
  try {
    await sandbox.files.write('note', 'remember\n')
    // What is hard to keep: attributes, exact times, capabilities, sparse files, links.
    const make = `import os
os.makedirs('kept/a\\nb'); p='kept/a\\nb/f'; open(p,'w').write('x'); os.link(p,'kept/hard'); os.symlink('nowhere','kept/soft')
os.setxattr(p,'user.bytes',bytes(range(256))); os.setxattr(p,'user.none',b''); os.setxattr(p,'user.a=b',b'c')
os.utime(p, ns=(1_000_000_001, 1_234_567_890_123_456_789)); os.truncate('kept/hard', 1)
open('kept/sparse','wb').truncate(1<<30)`
    const look = `import os
p='kept/a\\nb/f'; print(sorted((k,os.getxattr(p,k)) for k in os.listxattr(p)), os.stat(p).st_nlink, os.readlink('kept/soft'), os.stat('kept/sparse').st_size, os.stat(p).st_mtime_ns, os.getxattr('/srv/prog','security.capability'))`
    await sandbox.commands.run(`sudo cp /bin/true /srv/prog && sudo python3 -c "import os; os.setxattr('/srv/prog','security.capability',bytes.fromhex('0100000200200000000000000000000000000000'))"`)
    await sandbox.files.write('make.py', make)
    await sandbox.files.write('look.py', look)
    await sandbox.commands.run('python3 make.py')
    const files = (await sandbox.commands.run('python3 look.py')).stdout
    await sandbox.commands.run('sleep 3600', { background: true, timeoutMs: 0 })
    await until('sleep', async () => (await state(sandbox)).sleeps === '1')
    const before = await state(sandbox)
    assert.deepEqual(before, { boot: before.boot, note: 'remember', sleeps: '1', kept: 'yes', user: 'user', dir: '/home/user' })

    const boots = new Set([before.boot])
    for (const pause of [() => sandbox.pause({ keepMemory: false }), () => control('POST', `/sandboxes/${sandbox.sandboxId}/pause`, { memory: false })]) {
      await pause()
      assert.equal((await sandbox.getInfo()).state, 'paused')
      assert.equal(await sandbox.isRunning(), false)
      assert.equal(await sandbox.pause(), false)
      // Traffic does not boot it, although autoResume is on.
      await assert.rejects(sandbox.commands.run('true'), SandboxNotFoundError)
      assert.equal((await sandbox.getInfo()).state, 'paused')
      await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 600_000 })
      const after = await state(sandbox)
      assert.deepEqual(after, { ...before, boot: after.boot, sleeps: '0' })
      assert.equal((await sandbox.commands.run('python3 look.py')).stdout, files)
      assert.ok(!boots.has(after.boot), 'the boot id is the same')
      boots.add(after.boot)
    }

    // A pause with memory follows, and a reboot from it; one that runs is left alone.
    await sandbox.commands.run('sleep 3600', { background: true, timeoutMs: 0 })
    await sandbox.pause()
    const path = `/v2/sandboxes/${sandbox.sandboxId}/connect`
    assert.equal((await control('POST', path, { memory: false })).status, 201)
    const rebooted = await state(sandbox)
    assert.equal(rebooted.sleeps, '0')
    assert.ok(!boots.has(rebooted.boot))
    assert.equal((await control('POST', path, { memory: false })).status, 200)
    assert.equal((await state(sandbox)).boot, rebooted.boot)
    if (newer(2, 51)) {
      await sandbox.pause()
      await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 60_000, onResume: 'reboot' })
      assert.notEqual((await state(sandbox)).boot, rebooted.boot)
    }
  } finally {
    assert.equal(await sandbox.kill(), true)
  }
})

test('the end of its time pauses it without memory', async () => {
  const lifecycle = { onTimeout: { action: 'pause', keepMemory: false } }
  const both = await control('POST', '/v2/sandboxes', { templateID: 'base', autoPause: true, autoPauseMemory: false, autoResume: { enabled: true } })
  assert.deepEqual([both.status, both.body.code], [400, 400])
  const sandbox = await Sandbox.create({ timeoutMs: 60_000, lifecycle })
  try {
    assert.deepEqual((await sandbox.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: false })
    await sandbox.files.write('note', 'remember\n')
    const { boot } = await state(sandbox)
    await sandbox.setTimeout(1_000)
    await until('the pause', async () => (await sandbox.getInfo()).state === 'paused')
    await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 30_000 })
    const after = await state(sandbox)
    assert.equal(after.note, 'remember')
    assert.notEqual(after.boot, boot)
  } finally {
    assert.equal(await sandbox.kill(), true)
  }
})

test('how the end of its time is given', async () => {
  for (const [lifecycle, want] of [
    [{ onTimeout: 'kill' }, { onTimeout: 'kill', autoResume: false }],
    [{ onTimeout: { action: 'kill' } }, { onTimeout: 'kill', autoResume: false }],
    [{ onTimeout: 'kill', autoResume: false }, { onTimeout: 'kill', autoResume: false }],
    [{ onTimeout: 'pause', autoResume: false }, { onTimeout: 'pause', autoResume: false }],
    [{ onTimeout: { action: 'pause' } , autoResume: true }, { onTimeout: 'pause', autoResume: true }],
    [{ onTimeout: { action: 'pause', keepMemory: true }, autoResume: true }, { onTimeout: 'pause', autoResume: true }],
  ]) {
    const sandbox = await Sandbox.create({ timeoutMs: 60_000, lifecycle })
    try {
      assert.deepEqual((await sandbox.getInfo()).lifecycle, want)
    } finally {
      await sandbox.kill()
    }
  }
})
