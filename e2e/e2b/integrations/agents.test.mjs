// The E2B client of OpenAI's Agents SDK.
import { Manifest } from '@openai/agents/sandbox'
import { E2BSandboxClient } from '@openai/agents-extensions/sandbox/e2b'
import { assert, get, test, until } from './lib.mjs'

const manifest = () => new Manifest({
  entries: {
    'notes.md': { type: 'file', content: '# Notes\n' },
    src: { type: 'dir', children: { 'main.py': { type: 'file', content: 'print(6*7)\n' } } },
  },
})

// withSession runs a test with a session, and ends it.
function withSession(name, options, f) {
  test(name, async () => {
    const client = new E2BSandboxClient({ timeout: 120, env: { COLOR: 'blue' }, ...options })
    const session = await client.create({ manifest: manifest() })
    try {
      await f(session, client)
    } finally {
      session.state.pauseOnExit = false
      await session.close()
    }
  })
}

const text = async (session, path) => new TextDecoder().decode(await session.readFile({ path }))

withSession('agents: commands and input', {}, async (session) => {
  assert.match(await session.execCommand({ cmd: 'python3 src/main.py; pwd; echo $COLOR; id -un; exit 3' }),
    /code 3[\s\S]*42\n\/workspace\nblue\nuser\n/)
  assert.match(await session.execCommand({ cmd: 'id -un', runAs: 'root' }), /code 0[\s\S]*root/)
  assert.match(await session.execCommand({ cmd: 'pwd', workdir: 'src' }), /\/workspace\/src/)
  assert.equal(await session.running(), true)

  const started = await session.execCommand({ cmd: 'read line; echo "got: $line"; read never', tty: true, yieldTimeMs: 500 })
  const sessionId = Number(/session ID (\d+)/i.exec(started)[1])
  let output = await session.writeStdin({ sessionId, chars: 'hello\n' })
  await until('an answer of the terminal', async () => {
    if (output.includes('got: hello')) return true
    output += await session.writeStdin({ sessionId, chars: ' ' })
  })
})

withSession('agents: files', {}, async (session) => {
  const editor = session.createEditor()
  await editor.createFile({ type: 'create_file', path: 'deep/new.txt', diff: '+one\n+two\n' })
  assert.match(await text(session, 'deep/new.txt'), /^one\ntwo/)
  await editor.updateFile({ type: 'update_file', path: 'deep/new.txt', diff: '@@\n one\n-two\n+three\n' })
  assert.match(await text(session, 'deep/new.txt'), /^one\nthree/)
  await editor.deleteFile({ type: 'delete_file', path: 'notes.md' })
  assert.equal(await session.pathExists('notes.md'), false)
  assert.equal(await session.pathExists('src'), true)
  await session.materializeEntry({ path: 'more/data.bin', entry: { type: 'file', content: 'x'.repeat(100_000) } })
  assert.equal((await session.readFile({ path: 'more/data.bin' })).length, 100_000)
  await assert.rejects(session.readFile({ path: '../etc/passwd' }))
  await session.execCommand({ cmd: 'ln -s /etc/passwd out' })
  await assert.rejects(session.readFile({ path: 'out' }), /escape/)
})

withSession('agents: ports', { exposedPorts: [8000] }, async (session) => {
  await session.execCommand({ cmd: 'nohup python3 -m http.server 8000 >/dev/null 2>&1 &' })
  const { host, port, tls } = await session.resolveExposedPort(8000)
  assert.equal(tls, false) // the domain of the test has a port, so it is no HTTPS
  await until('the port', async () => (await get(`${host}:${port}`, '/notes.md')).body === '# Notes\n')
})

withSession('agents: a workspace as tar', {}, async (session, client) => {
  await session.execCommand({ cmd: 'echo more >> notes.md; rm -r src; mkdir kept; chmod 700 kept; seq 1000 > kept/n' })
  const archive = await session.persistWorkspace()
  const other = await client.create({ manifest: manifest() })
  try {
    await other.hydrateWorkspace(archive)
    assert.equal(await text(other, 'notes.md'), '# Notes\nmore\n')
    assert.match(await other.execCommand({ cmd: 'stat -c %a kept; tail -n 1 kept/n; ls src' }), /code 2[\s\S]*700\n1000/)
  } finally {
    await other.close()
  }
})

withSession('agents: a workspace as snapshot', { workspacePersistence: 'snapshot' }, async (session) => {
  await session.execCommand({ cmd: 'echo before > notes.md' })
  const first = session.state.sandboxId
  const archive = await session.persistWorkspace()
  assert.ok(archive.length < 1000, 'a reference and no archive')
  await session.execCommand({ cmd: 'echo after > notes.md' })
  await session.hydrateWorkspace(archive)
  assert.notEqual(session.state.sandboxId, first)
  assert.equal(await text(session, 'notes.md'), 'before\n')
  assert.match(await session.execCommand({ cmd: 'echo $COLOR' }), /blue/)
})

withSession('agents: pause and resume', { pauseOnExit: true }, async (session, client) => {
  await session.execCommand({ cmd: 'echo kept > notes.md; nohup sleep 1000 >/dev/null 2>&1 & echo $! > pid' })
  assert.equal(client.canPersistOwnedSessionState(session.state), true)
  const state = JSON.parse(JSON.stringify(await client.serializeSessionState(session.state)))
  await session.close()
  const resumed = await client.resume(await client.deserializeSessionState(state))
  assert.equal(resumed.state.sandboxId, session.state.sandboxId)
  assert.equal(await text(resumed, 'notes.md'), 'kept\n')
  assert.match(await resumed.execCommand({ cmd: 'kill -0 $(cat pid) && echo lives' }), /lives/)

  // A sandbox that is gone is made anew from the manifest.
  resumed.state.pauseOnExit = false
  await resumed.close()
  const again = await client.resume(await client.deserializeSessionState(state))
  try {
    assert.notEqual(again.state.sandboxId, session.state.sandboxId)
    assert.equal(await text(again, 'notes.md'), '# Notes\n')
  } finally {
    again.state.pauseOnExit = false
    await again.close()
  }
})
