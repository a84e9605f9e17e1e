// What offline.mjs promises.
import { assert, test } from './lib.mjs'

test('offline: no program reaches another machine', async () => {
  await assert.rejects(fetch('https://example.com'), (error) => /there is no network/.test(error.cause.message))
  assert.equal((await fetch(`${process.env.E2B_API_URL}/health`)).status, 200)
})
