import http from 'node:http'
import { Sandbox, assert, test, until } from './lib.mjs'

const base = process.env.E2B_SANDBOX_URL

// through makes a request to a port with the routing headers.
function through(sandbox, port, path = '/', headers = {}) {
  return fetch(base + path, { headers: { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': `${port}`, ...headers } })
}

// byHost makes a request to a host name. fetch cannot set the header Host.
function byHost(host, path = '/') {
  return new Promise((resolve, reject) => {
    http.get(base + path, { headers: { Host: host } }, (r) => {
      let body = ''
      r.on('data', (d) => { body += d })
      r.on('end', () => resolve({ status: r.statusCode, body }))
      r.on('error', reject)
    }).on('error', reject)
  })
}

const program = `
import http.server, time
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/slow':
            self.send_response(200); self.end_headers()
            for i in range(100):
                self.wfile.write(b'tick\\n'); self.wfile.flush(); time.sleep(0.1)
            return
        body = ('from inside ' + self.path + ' ' + self.headers['Host']).encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
http.server.ThreadingHTTPServer(('127.0.0.1', 8000), H).serve_forever()
`

async function serving(options = {}) {
  const sandbox = await Sandbox.create({ timeoutMs: 600_000, ...options })
  await sandbox.files.write('server.py', program)
  await sandbox.commands.run('python3 server.py', { background: true, timeoutMs: 0 })
  return sandbox
}

test('ports', async () => {
  const sandbox = await serving()
  try {
    await until('the server', async () => (await through(sandbox, 8000)).status === 200)
    const r = await through(sandbox, 8000, '/a?b=c')
    assert.match(await r.text(), /^from inside \/a\?b=c /)
    const host = await byHost(`8000-${sandbox.sandboxId}.anything.example`, '/by-host')
    assert.deepEqual([host.status, host.body], [200, `from inside /by-host 8000-${sandbox.sandboxId}.anything.example`])
    const closed = await through(sandbox, 9000)
    assert.deepEqual([closed.status, await closed.json()], [502, { sandboxId: sandbox.sandboxId, message: 'The sandbox is running but port is not open', port: 9000, code: 502 }])
    // A stream arrives as it is written, and breaks when the sandbox is killed.
    const slow = (await through(sandbox, 8000, '/slow')).body.getReader()
    assert.match(new TextDecoder().decode((await slow.read()).value), /^tick/)
    assert.equal(await sandbox.kill(), true)
    await assert.rejects(async () => { while (!(await slow.read()).done); })
    const gone = await through(sandbox, 8000)
    assert.deepEqual([gone.status, await gone.json()], [502, { sandboxId: sandbox.sandboxId, message: 'The sandbox was not found', code: 502 }])
  } finally {
    await sandbox.kill()
  }
})

test('private ports and another host', async () => {
  const sandbox = await serving({ network: { allowPublicTraffic: false, maskRequestHost: 'localhost:${PORT}' } })
  try {
    assert.ok(sandbox.trafficAccessToken)
    const token = { 'e2b-traffic-access-token': sandbox.trafficAccessToken }
    await until('the server', async () => (await through(sandbox, 8000, '/', token)).status === 200)
    assert.equal(await (await through(sandbox, 8000, '/x', token)).text(), 'from inside /x localhost:8000')
    for (const headers of [{}, { 'e2b-traffic-access-token': 'wrong' }]) {
      const r = await through(sandbox, 8000, '/', headers)
      assert.deepEqual([r.status, (await r.json()).code], [403, 403])
    }
    assert.equal((await byHost(`8000-${sandbox.sandboxId}.x`)).status, 403)
    assert.equal((await sandbox.commands.run('echo of its own')).stdout, 'of its own\n')
  } finally {
    await sandbox.kill()
  }
})

test('a request wakes a server', async () => {
  const sandbox = await serving({ lifecycle: { onTimeout: 'pause', autoResume: true } })
  const quiet = await serving()
  try {
    for (const s of [sandbox, quiet]) {
      await until('the server', async () => (await through(s, 8000)).status === 200)
      await s.pause()
    }
    const r = await through(sandbox, 8000, '/awake')
    assert.equal(r.status, 200)
    assert.match(await r.text(), /^from inside \/awake/)
    assert.equal((await sandbox.getInfo()).state, 'running')
    assert.equal((await through(quiet, 8000)).status, 502)
    assert.equal((await quiet.getInfo()).state, 'paused')
    await Sandbox.connect(quiet.sandboxId)
    assert.equal((await through(quiet, 8000)).status, 200)
  } finally {
    await Promise.all([sandbox.kill(), quiet.kill()])
  }
})

test('the host of a port', async () => {
  const sandbox = await serving()
  try {
    const host = sandbox.getHost(8000)
    assert.equal(host, `8000-${sandbox.sandboxId}.localhost:${new URL(base).port}`)
    await until('the server', async () => (await byHost(host)).status === 200)
    assert.equal((await byHost(host, '/x')).body, `from inside /x ${host}`)
  } finally {
    await sandbox.kill()
  }
})
