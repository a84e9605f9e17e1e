// Helpers of the tests. The tests run with the environment that an E2B user sets, and in the
// directory of one version of the client.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { note } from './record.mjs'
import { Sandbox } from 'e2b'

export * from 'e2b'
export { assert, note, test }

// withSandbox runs a test with a sandbox that it kills at the end, so that a failed test does not
// leave the sandbox until its timeout.
export function withSandbox(name, options, f) {
  if (typeof options === 'function') [options, f] = [{}, options]
  test(name, async (t) => {
    const sandbox = await Sandbox.create({ timeoutMs: 600_000, ...options })
    try {
      await f(sandbox, t)
    } finally {
      await sandbox.kill()
    }
  })
}

// until polls f until it returns a true value, for ms milliseconds at most.
export async function until(what, f, ms = 120_000) {
  const end = Date.now() + ms
  for (;;) {
    const v = await f()
    if (v) return v
    if (Date.now() > end) throw new Error(`not after ${ms} ms: ${what}`)
    await new Promise((r) => setTimeout(r, 100))
  }
}

// newer reports whether the client has this version or a newer one.
export function newer(major, minor) {
  const [a, b] = process.env.E2B_TEST_VERSION.split('.').map(Number)
  return a > major || (a === major && b >= minor)
}

export const api = process.env.E2B_API_URL
export const key = process.env.E2B_API_KEY

// control makes a call of the control API without the client.
export async function control(method, path, body) {
  const r = await fetch(api + path, { method, headers: { 'X-API-Key': key, 'Content-Type': 'application/json' }, body: body && JSON.stringify(body) })
  const text = await r.text()
  return { status: r.status, headers: r.headers, body: text ? JSON.parse(text) : undefined }
}
