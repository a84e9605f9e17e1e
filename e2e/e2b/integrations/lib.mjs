// Helpers of the tests of programs that use E2B.
import assert from 'node:assert/strict'
import http from 'node:http'
import { test } from 'node:test'

export { assert, test }

// get asks a port of a sandbox, by the host name that a program has got for it. The name belongs to
// the server of the test, which no name server knows.
export function get(host, path = '/') {
  const url = new URL(process.env.E2B_SANDBOX_URL)
  return new Promise((resolve, reject) => {
    http.get({ host: url.hostname, port: url.port, path, headers: { Host: host } }, async (response) => {
      let body = ''
      for await (const chunk of response) body += chunk
      resolve({ status: response.statusCode, body })
    }).on('error', reject)
  })
}

// until polls f until it returns a true value, for half a minute at most.
export async function until(what, f) {
  const end = Date.now() + 30_000
  for (;;) {
    const value = await f()
    if (value) return value
    if (Date.now() > end) throw new Error(`not after half a minute: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
}
