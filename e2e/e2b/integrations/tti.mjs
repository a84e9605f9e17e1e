// Measures the time to interactive as ComputeSDK's own benchmark defines it: from the call that
// creates a sandbox until `node -v` has answered in it, one sandbox after the other. The destroy is
// not in it. `node tti.mjs N` prints the milliseconds of N sandboxes as JSON.
import { argv } from 'node:process'
import { pathToFileURL } from 'node:url'
import { e2b } from '@computesdk/e2b'

export async function timeToInteractive(sandboxes) {
  const compute = e2b({ apiKey: process.env.E2B_API_KEY })
  const times = []
  for (let i = 0; i < sandboxes; i++) {
    const start = performance.now()
    const sandbox = await compute.sandbox.create()
    try {
      const result = await sandbox.runCommand('node -v')
      if (result.exitCode !== 0) throw new Error(`node -v: ${result.exitCode} ${result.stderr}`)
      times.push(performance.now() - start)
    } finally {
      await sandbox.destroy()
    }
  }
  return times
}

if (import.meta.url === pathToFileURL(argv[1]).href) console.log(JSON.stringify(await timeToInteractive(Number(argv[2]))))
