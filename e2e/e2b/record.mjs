// Notes which methods of the client the tests call and how the calls end, for the matrix in docs/e2b.md. With
// E2B_TEST_METHODS it prints the methods that there are instead.
import { AsyncLocalStorage } from 'node:async_hooks'
import { appendFileSync } from 'node:fs'
import { Sandbox, Secret, Template, TemplateBase, Volume } from 'e2b'

const within = new AsyncLocalStorage() // of a call that a test made: what it calls is the client's own business
const seen = new Set()

// byTest are methods that ask no server. A test notes what the server says to what they are for.
const byTest = ['Secret.list', 'sandbox.getMcpUrl', 'sandbox.getMcpToken', 'template.addMcpServer',
  'template.betaDevContainerPrebuild', 'template.betaSetDevContainerStart']

export { note }

// note writes that a test called a method. An error counts only if the server refused the call for good.
function note(name, error) {
  const refused = error && /^501\b/.test(error.message) ? error.message.replace(/^501:? */, '') : ''
  if (error && !refused) return
  const line = JSON.stringify({ name, refused }) + '\n'
  if (seen.has(line)) return
  seen.add(line)
  if (process.env.E2B_TEST_RECORD) appendFileSync(process.env.E2B_TEST_RECORD, line)
}

function wrap(owner, key, name) {
  const original = owner[key]
  owner[key] = function (...args) {
    if (within.getStore()) return original.apply(this, args)
    let result
    try {
      result = within.run(true, () => original.apply(this, args))
    } catch (e) {
      note(name, e)
      throw e
    }
    if (typeof result?.then === 'function') {
      result.then((v) => { note(name); watch(v) }, (e) => note(name, e))
    } else {
      note(name)
      watch(result)
    }
    return result
  }
}

// own are methods that TypeScript's declarations call private or protected, and one that asks no server.
const own = /^(constructor|iamToken|resolveApiOpts|fileUrl|createSandbox|forkSandbox|connectSandbox|start|iterateEvents|handleEvents|flushDecoders|runGit|runShell|getRemoteUrl|resolveRemoteName|withRemoteCredentials|hasUpstream|collectStackTrace|instructionsWithHashes|serialize|then|fill)$|^_/

function methods(owner) {
  return Object.getOwnPropertyNames(owner).filter((key) => {
    const { value } = Object.getOwnPropertyDescriptor(owner, key)
    return typeof value === 'function' && !own.test(key)
  })
}

// Objects that only calls return, by their class.
const returned = {
  CommandHandle: ['command', ['wait', 'disconnect', 'kill', 'sendStdin', 'closeStdin']],
  WatchHandle: ['watcher', ['stop']],
  SandboxPaginator: ['pages', ['nextItems']],
  SnapshotPaginator: ['pages', ['nextItems']],
}
const watched = new Set()

// watch wraps the methods of a class when a call first returns an object of it.
function watch(value) {
  if (Array.isArray(value)) value = value[0]
  for (let proto = value && Object.getPrototypeOf(value); proto && proto !== Object.prototype; proto = Object.getPrototypeOf(proto)) {
    const known = returned[value.constructor?.name]
    if (!known || watched.has(proto)) continue
    watched.add(proto)
    for (const key of known[1]) if (Object.hasOwn(proto, key)) wrap(proto, key, `${known[0]}.${key}`)
  }
}

const example = new Sandbox({ sandboxId: 'x', envdVersion: '0.6.13', apiKey: 'e2b_00', domain: 'example.test' })
const groups = [
  ['Sandbox', Sandbox], ['Sandbox', Object.getPrototypeOf(Sandbox)], ['sandbox', Sandbox.prototype],
  ...['files', 'commands', 'pty', 'git'].map((name) => [`sandbox.${name}`, Object.getPrototypeOf(example[name])]),
  ['Template', TemplateBase], ['template', TemplateBase.prototype],
  ['Volume', Volume], ['Secret', Secret], // the methods of a volume need one
]

if (process.env.E2B_TEST_METHODS) {
  const all = groups.flatMap(([name, owner]) => methods(owner ?? {}).map((key) => `${name}.${key}`))
  for (const [name, keys] of Object.values(returned)) all.push(...keys.map((key) => `${name}.${key}`))
  console.log(JSON.stringify([...new Set(all)].filter((name) => name !== 'template.build')))
} else {
  for (const [name, owner] of groups) {
    for (const key of methods(owner ?? {})) {
      if (byTest.includes(`${name}.${key}`)) continue
      if (name !== 'template') {
        wrap(owner, key, `${name}.${key}`)
        if (name === 'Template') Template[key] = owner[key]
        continue
      }
      // A frame more on the stack would hide the line of the program that an error points at.
      const original = owner[key]
      Object.defineProperty(owner, key, { get() { note(`template.${key}`); return original }, configurable: true })
    }
  }
}
