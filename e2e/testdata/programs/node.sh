# A server and its client, threads, files, a child process.
cat >/tmp/try.mjs <<'end'
import { createServer } from 'node:http'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, writeFileSync, readFileSync, watch } from 'node:fs'
import { Worker } from 'node:worker_threads'
const server = createServer((request, answer) => answer.end(request.url)).listen(0, '127.0.0.1')
await new Promise(done => server.once('listening', done))
for (let i = 0; i < 200; i++) {
  const text = await (await fetch(`http://127.0.0.1:${server.address().port}/${i}`)).text()
  if (text !== '/' + i) throw new Error(text)
}
server.close()
server.closeAllConnections()
const dir = mkdtempSync('/tmp/node-')
const seen = new Promise(done => { const w = watch(dir, () => { w.close(); done() }) })
writeFileSync(dir + '/a', 'x'.repeat(1 << 20))
await seen
if (readFileSync(dir + '/a').length !== 1 << 20) throw new Error('short')
const sums = await Promise.all([1, 2, 3].map(n => new Promise((done, fail) => {
  const w = new Worker(`let s = 0; for (let i = 0; i < 1e6; i++) s += ${n}; require('node:worker_threads').parentPort.postMessage(s)`, { eval: true })
  w.once('message', done).once('error', fail)
})))
console.log(sums.join(), execFileSync('echo', ['child']).toString().trim())
end
node /tmp/try.mjs | grep '^1000000,2000000,3000000 child$'
