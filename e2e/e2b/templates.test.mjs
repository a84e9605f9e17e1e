// Templates from code.
import { mkdtempSync, mkdirSync, writeFileSync, symlinkSync, chmodSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  assert, note, test, control, until, newer, Sandbox, Template, waitForFile, waitForPort, waitForProcess, waitForTimeout, waitForURL,
} from './lib.mjs'

const name = (what) => `${what}__${process.env.E2B_TEST_VERSION.replace(/\./g, '-')}`

// files makes a directory of files.
function files(t) {
  const dir = mkdtempSync(join(tmpdir(), 'cay-template-'))
  t.after(() => rmSync(dir, { recursive: true }))
  mkdirSync(join(dir, 'app/deep'), { recursive: true })
  writeFileSync(join(dir, 'app/main.py'), `print("${name('one')}")\n`) // uploads are the organization's
  writeFileSync(join(dir, 'app/deep/a b$c.txt'), 'deep\n')
  chmodSync(join(dir, 'app/deep/a b$c.txt'), 0o640)
  symlinkSync('main.py', join(dir, 'app/link'))
  writeFileSync(join(dir, 'one[1].txt'), 'one\n')
  writeFileSync(join(dir, 'serve.sh'), 'cd /srv/app && exec python3 -m http.server "$PORT"\n')
  writeFileSync(join(dir, 'skipped.log'), 'a secret\n')
  writeFileSync(join(dir, '.dockerignore'), '*.log\n')
  return dir
}

// built builds a template and returns what Template.build does, and the log.
async function built(template, name, options = {}) {
  const lines = []
  const info = await Template.build(template, name, { ...options, onBuildLogs: (e) => lines.push(e) })
  return { ...info, lines, text: lines.map((e) => e.message).join('\n') }
}

// within runs a function with a sandbox of a template, and what it prints for a command.
async function within(template, f) {
  const sandbox = await Sandbox.create(template, { timeoutMs: 600_000 })
  try {
    await f(async (command, options) => (await sandbox.commands.run(command, options)).stdout, sandbox)
  } finally {
    await sandbox.kill()
  }
}

test('all kinds of steps', async (t) => {
  const dir = files(t)
  const make = () => Template({ fileContextPath: dir })
    .fromTemplate('python')
    .setEnvs({ PORT: '8123', ODD: 'a "b" \'c\' \\ # $NOTHING\nRUN touch /evil', MORE: '<<EOF', PATH: '/opt/bin:$PATH' })
    .copy('app', '/srv/app', { user: 'root', mode: 0o755 })
    .copy('app', 'kept/')
    .copy('*.txt', 'globbed')
    .copy('app/link', 'here')
    .copy('app/link', 'resolved', { resolveSymlinks: true })
    .copyItems([{ src: 'app/main.py', dest: 'renamed.py' }, { src: 'app/main.py', dest: '/opt/', user: 'root' }])
    .runCmd('id -un > who; pwd > where; echo "$ODD" > odd')
    .runCmd(['id -un', 'touch /root/was'], { user: 'root' })
    .runCmd('cat > script <<EOF\n# not a comment\n  $HOME\nEOF\n')
    .makeDir('made', { mode: 0o700 })
    .makeSymlink('/srv/app', 'app')
    .rename('script', 'script.txt')
    .remove('where', { force: true })
    .setUser('keeper')
    .setWorkdir('/var/kept/it')
    .runCmd('id -un > who')
    .setUser('user')
    .setWorkdir('/home/user')
    .copy('serve.sh', '/usr/local/bin/serve', { user: 'root', mode: 0o755 })
    .copy('.', '/all', { user: 'root' })
    .runCmd('date +%s%N > after')
    .setStartCmd('sh /usr/local/bin/serve', waitForPort(8123))
  assert.equal(await Template.exists(name('steps')), false)
  const began = Date.now()
  const first = await built(make(), name('steps'), { cpuCount: 2, memoryMB: 1024 })
  assert.match(first.text, /RUN id -un && touch \/root\/was/)
  assert.match(first.text, /Uploaded 'app'/)
  assert.ok(first.lines.every((e) => ['debug', 'info', 'warn', 'error'].includes(e.level) && e.timestamp >= began && e.timestamp <= Date.now()))
  assert.ok(first.lines.some((e) => e.level === 'debug') && first.lines.some((e) => e.level === 'info'))
  assert.equal(await Template.exists(name('steps')), true)
  const status = await Template.getBuildStatus(first)
  assert.equal(status.status, 'ready')
  assert.ok(status.logEntries.length > 0)
  assert.equal((await Template.getBuildStatus(first, { logsOffset: 1_000_000 })).logEntries.length, 0)

  let after
  await within(name('steps'), async (out, sandbox) => {
    const info = await sandbox.getInfo()
    assert.deepEqual([info.cpuCount, info.memoryMB], [2, 1024])
    assert.equal(await out('cat who; pwd; id -un'), 'user\n/home/user\nuser\n')
    assert.equal(await out('printenv ODD MORE PORT; printenv CAY_LF || echo none; cat odd; ls / | grep evil || echo none'),
      'a "b" \'c\' \\ # \nRUN touch /evil\n<<EOF\n8123\nnone\na "b" \'c\' \\ # \nRUN touch /evil\nnone\n')
    assert.equal(await out('cd /srv/app && find . -mindepth 1 -printf "%p %M %u %l\\n" | sort'),
      './deep drwxr-xr-x root \n./deep/a b$c.txt -rwxr-xr-x root \n./link lrwxrwxrwx root main.py\n./main.py -rwxr-xr-x root \n')
    assert.equal(await out('find kept globbed here resolved made app renamed.py /opt/main.py -maxdepth 2 -type f -printf "%p %m %u\\n" -o -type l -printf "%p -> %l %u\\n" | sort'),
      '/opt/main.py 644 root\napp -> /srv/app user\nglobbed/one[1].txt 644 user\nhere -> main.py user\nkept/deep/a b$c.txt 640 user\n' +
      'kept/link -> main.py user\nkept/main.py 644 user\nrenamed.py 644 user\nresolved 644 user\n')
    assert.equal(await out('ls -A /all; stat -c "%U %a" made'), '.dockerignore\napp\none[1].txt\nserve.sh\nuser 700\n')
    assert.equal(await out('cat script.txt; ls where 2>/dev/null || true; cat /var/kept/it/who; stat -c %U /var/kept/it'),
      '# not a comment\n  /home/user\nkeeper\nkeeper\n')
    assert.equal(await out('curl -s localhost:8123/main.py'), `print("${name('one')}")\n`)
    assert.equal(await out('ls /root/was', { user: 'root' }), '/root/was\n')
    after = await out('cat after')
  })

  // The same again is not built, and not uploaded.
  const again = await built(make(), name('steps'), { cpuCount: 2, memoryMB: 1024 })
  assert.equal(again.templateId, first.templateId)
  assert.match(again.text, /Skipping upload of 'app', already cached/)
  assert.doesNotMatch(again.text, /Uploaded/)
  await within(name('steps'), async (out) => assert.equal(await out('cat after'), after))

  if (!newer(2, 51)) return // the rest is the server's alone and the same for every client
  // Entries name their step as the client counts it, although it reads no step of them.
  const { body } = await control('GET', `/templates/${first.templateId}/builds/${first.buildId}/status`)
  const stepOf = (text) => body.logEntries.find((e) => e.message.includes(text))?.step
  assert.deepEqual([stepOf('FROM python'), stepOf('RUN id -un > who; pwd'), stepOf('RUN date')], ['base', '9', '23'])
  // Another file: what comes before its step is not done again, what comes after it is.
  writeFileSync(join(dir, 'serve.sh'), 'cd /srv/app && exec python3 -m http.server "$PORT" # changed\n')
  const changed = await built(make(), name('steps'), { cpuCount: 2, memoryMB: 1024 })
  const outcome = changed.text.split('\n').reduce((all, line) => {
    const m = /^step \d+: (.*)$/.exec(line)
    if (m) all.push([m[1], ''])
    else if (line === 'cached' && all.length > 0) all.at(-1)[1] = 'cached'
    return all
  }, [])
  const done = (what) => outcome.find(([step]) => step.startsWith(what))?.[1]
  assert.equal(done('COPY --chmod=0755 [1/'), 'cached')
  assert.equal(done('RUN date'), '')
  await within(name('steps'), async (out) => {
    assert.notEqual(await out('cat after'), after)
    assert.match(await out('cat /usr/local/bin/serve'), /changed/)
  })
})

test('a step that fails', async () => {
  const template = Template().fromTemplate('python')
    .runCmd('true')
    .setEnvs({ A: 'b' })
  const line = Number(/:(\d+):\d+\)?$/m.exec(new Error().stack.split('\n')[1])[1]) + 1
  template.runCmd('echo said this >&2; exit 3')
  template.runCmd('echo never')
  const lines = []
  const error = await Template.build(template, name('fails'), { onBuildLogs: (e) => lines.push(e) }).then(() => null, (e) => e)
  assert.equal(error?.name, 'BuildError')
  assert.equal(error.message, 'step 3: RUN echo said this >&2; exit 3: exit code 3\nsaid this')
  assert.match(error.stack.split('\n')[0], new RegExp(`templates\\.test\\.mjs:${line}:`))
  assert.ok(lines.some((e) => e.level === 'error' && e.message.includes('exit code 3')))
  await assert.rejects(Sandbox.create(name('fails')), /exit code 3/)

  // A command of several lines is told as it was given.
  const several = await Template.build(Template().fromTemplate('python').runCmd('echo a\nexit 4'), name('fails')).then(() => null, (e) => e)
  assert.match(several.message, /^step 1: RUN echo a\nexit 4: exit code 4/)
  // What cannot be a step fails at its line too.
  const lineOf = (text) => Number(/:(\d+):\d+\)?$/m.exec(text)[1])
  for (const [what, add] of [['USER', (t) => t.setUser('a b')], ['WORKDIR', (t) => t.setWorkdir('/a\nRUN id')], ['ENV', (t) => t.setEnvs({ 'A B': 'c' })]]) {
    const here = lineOf(new Error().stack.split('\n')[1])
    const lines = []
    const refusal = await Template.build(add(Template().fromTemplate('python').runCmd('true')), name('wrong'), { onBuildLogs: (e) => lines.push(e) })
      .then(() => null, (e) => e)
    assert.equal(refusal?.name, 'BuildError')
    assert.match(refusal.message, new RegExp(`^step 2: ${what}: `))
    assert.equal(lineOf(refusal.stack.split('\n')[0]), here - 1)
    assert.ok(lines.some((e) => e.level === 'error' && e.message === refusal.message))
  }
  await assert.rejects(Template.build(Template().fromTemplate(name('no-such')).runCmd('true'), name('wrong')), /404/)
  await assert.rejects(Template.build(Template().fromTemplate('python').runCmd('true'), name('wrong'), { cpuCount: 1000 }), /400.*no size/)
  assert.equal(await Template.exists(name('wrong')), false)
})

// What follows is the server's alone too.
const once = newer(2, 51) ? test : () => {}

once('what a create waits for, and forced uploads', async (t) => {
  // The server answers at last, after what the other commands wait for.
  const start = 'sleep 1; touch /tmp/there; exec python3 -m http.server 8124'
  await Promise.all(Object.entries({
    url: [waitForURL('http://localhost:8124/', 200), 'curl -sf localhost:8124 >/dev/null && echo yes'],
    process: [waitForProcess('python3'), 'pgrep python3 >/dev/null && echo yes'],
    file: [waitForFile('/tmp/there'), '[ -f /tmp/there ] && echo yes'],
    command: ['test -d /proc/self && [ -f /tmp/there ]', '[ -f /tmp/there ] && echo yes'],
  }).map(async ([what, [ready, look]]) => {
    await built(Template().fromTemplate('python').setStartCmd(start, ready), name(`waits-${what}`))
    await within(name(`waits-${what}`), async (out) => assert.equal(await out(look), 'yes\n', what))
  }))

  const dir = files(t)
  const template = () => Template({ fileContextPath: dir }).fromTemplate('python')
    .copy('app', 'plain', { gzip: false }).copy('app/main.py', 'forced', { forceUpload: true })
  const one = await built(template(), name('forced'))
  const two = await built(template(), name('forced'))
  for (const { text } of [one, two]) assert.match(text, /Uploaded 'app\/main\.py'/)
  assert.match(one.text, /Uploaded 'app'/)
  assert.match(two.text, /Skipping upload of 'app'/)
  await within(name('forced'), async (out) => assert.equal(await out('cmp forced plain/main.py && readlink plain/link'), 'main.py\n'))
})

// wheel makes a package of Python with one module that prints hello.
const wheel = `python3 - <<'EOF'
import zipfile
with zipfile.ZipFile("hello-1-py3-none-any.whl", "w") as z:
    z.writestr("hello.py", "print('hello')")
    z.writestr("hello-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: hello\\nVersion: 1\\n")
    z.writestr("hello-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    z.writestr("hello-1.dist-info/RECORD", "")
EOF`

// installers installs packages that need no registry.
const installers = (template) => template
  .runCmd([wheel, 'mkdir greet', 'echo \'{"name":"greet","version":"1.0.0","main":"i.js","bin":"i.js"}\' > greet/package.json',
    'printf "#!/usr/bin/env node\nconsole.log(\'hi\')\n" > greet/i.js'].join('\n'))
  .pipInstall('./hello-1-py3-none-any.whl').npmInstall('./greet', { g: true })

once('images without a registry, and tags', async () => {
  // The default of Template() and what it is called are cay's base.
  const one = await built(installers(Template().fromBaseImage().runCmd(`id -un | tee who # ${name('own')}`)), `${name('own')}:v1`)
  assert.match(one.text, /^user$/m)
  assert.deepEqual(one.tags, ['v1'])
  const error = await Template.build(Template().fromImage('ghcr.io/no/such:1', { username: 'u', password: 'secret' }).runCmd('true'), name('none'))
    .then(() => null, (e) => e)
  assert.match(error.message, /this server asks no image registry/)
  assert.doesNotMatch(error.message, /secret/)
  const dockerfile = 'FROM python:3.13\nENV A=x B=$A\nWORKDIR /srv\nRUN echo "$A $B" > a && id -un > who\nCMD sleep 1000'
  const two = await built(Template().fromDockerfile(dockerfile), name('own'), { tags: ['v2', 'default'] })
  assert.ok(two.lines.some((e) => e.level === 'warn' && /no registry answers for python:3.13: the template python is used/.test(e.message)))
  assert.deepEqual([two.tags, two.name, two.templateId], [['default', 'v2'], name('own'), one.templateId])
  // A build for a tag alone does not become the default.
  const three = await built(Template().fromTemplate('python').runCmd('echo three > who'), name('own'), { tags: ['v3', 'latest'] })
  await within(name('own'), async (out) => assert.equal(await out('cd /srv; cat a who; id -un; pgrep -c sleep'), 'x \nroot\nuser\n1\n'))
  await within(`${name('own')}:latest`, async (out) => assert.equal(await out('cat who'), 'three\n'))

  await within(`${name('own')}:v1`, async (out) => {
    assert.equal(await out('cat who; ls /srv'), 'user\n')
    assert.equal(await out('python3 -m hello; greet'), 'hello\nhi\n')
  })
  assert.deepEqual(await Template.assignTags(`${name('own')}:v1`, ['stable', 'old']), { buildId: one.buildId, tags: ['old', 'stable'] })
  assert.deepEqual((await Template.getTags(one.templateId)).map((t) => [t.tag, t.buildId]),
    [['default', two.buildId], ['latest', three.buildId], ['old', one.buildId], ['stable', one.buildId], ['v1', one.buildId],
      ['v2', two.buildId], ['v3', three.buildId]])
  await Template.assignTags(`${name('own')}:v3`, 'default')
  await within(name('own'), async (out) => assert.equal(await out('cat who'), 'three\n'))
  await Template.removeTags(name('own'), 'old')
  assert.equal(await Template.exists(`${name('own')}:stable`), true)
  assert.equal(await Template.exists(`${name('own')}:old`), false)
  await assert.rejects(Sandbox.create(`${name('own')}:old`), /404.*no tag/)
})

once('builds in the background, from templates, and their end', async () => {
  const slow = Template().fromTemplate('python').runCmd('sleep 100')
  const info = await Template.buildInBackground(slow, name('slow'))
  await until('the build runs', async () => (await Template.getBuildStatus(info)).status === 'building')
  // The next build of the template takes its place.
  const quick = await Template.buildInBackground(Template().fromTemplate('python').runCmd('echo 1 > n').setStartCmd('sleep 1000', waitForTimeout(2_000)), name('slow'))
  assert.equal(quick.templateId, info.templateId)
  await until('the next build', async () => (await Template.getBuildStatus(quick)).status === 'ready')
  const before = await Template.getBuildStatus(info)
  assert.equal(before.status, 'error')
  assert.match(before.reason.message, /newer build/)
  // A template of it has its start command.
  await built(Template().fromTemplate(name('slow')).skipCache().runCmd('echo 2 >> n'), name('child'))
  await within(name('child'), async (out) => assert.equal(await out('cat n; pgrep -c sleep; [ $(cut -d. -f1 /proc/uptime) -ge 2 ] && echo waited'), '1\n2\n1\nwaited\n'))
  const gone = await control('DELETE', `/templates/${name('child')}`)
  assert.equal(gone.status, 204, JSON.stringify(gone.body))
  assert.equal(await Template.exists(name('child')), false)
  assert.match(Template.toDockerfile(Template().fromImage('debian:12').runCmd('true')), /^FROM debian:12\nRUN true/)
  assert.equal(JSON.parse(await Template.toJSON(slow)).fromTemplate, 'python')
})

// steps returns what the client makes of a template without a server.
const steps = async (template) => {
  const { fromImage, fromTemplate, steps } = JSON.parse(await Template.toJSON(template))
  return [fromImage ?? fromTemplate, ...steps.map((s) => [s.type, s.args?.[0]].join(' '))]
}

once('methods that need a registry, and those for templates of theirs', async () => {
  for (const [template, want] of [
    [Template().fromDebianImage('x'), ['debian:x']], [Template().fromUbuntuImage('x'), ['ubuntu:x']], [Template().fromFedoraImage('x'), ['fedora:x']],
    [Template().fromAlpineImage('x'), ['alpine:x']], [Template().fromArchImage('x'), ['archlinux:x']], [Template().fromPythonImage('x'), ['python:x']],
    [Template().fromNodeImage('x'), ['node:x']], [Template().fromBunImage('x'), ['oven/bun:x']],
  ]) assert.deepEqual(await steps(template), want)
  assert.equal(JSON.parse(await Template.toJSON(Template().fromGCPRegistry('g/i', { serviceAccountJSON: { a: 1 } }))).fromImageRegistry.type, 'gcp')
  const aws = (image) => Template().fromAWSRegistry(image, { accessKeyId: 'a', secretAccessKey: 'the-secret', region: 'eu-west-1' })
  const refusal = await Template.build(aws('1.dkr.ecr.eu-west-2.amazonaws.com/i'), name('refused')).then(() => null, (e) => e)
  assert.match(refusal.message, /400.*eu-west-2/)
  const unreachable = await Template.build(aws('1.dkr.ecr.eu-west-1.amazonaws.com/i'), name('refused')).then(() => null, (e) => e)
  assert.match(unreachable.message, /this server asks no image registry/)
  assert.doesNotMatch(unreachable.message, /the-secret/)
  for (const [template, want] of [
    [Template().fromTemplate('python').aptInstall('jq'), /^RUN .*apt-get install .*jq/], [Template().fromTemplate('python').pipInstall('six'), /^RUN pip install .*six/],
    [Template().fromTemplate('python').npmInstall('is-odd'), /^RUN npm install .*is-odd/], [Template().fromTemplate('python').bunInstall('is-odd'), /^RUN bun install .*is-odd/],
  ]) assert.match((await steps(template)).at(-1).replace(/^RUN (sudo )?(DEBIAN_FRONTEND=\S+ )?/, 'RUN '), want)
  assert.equal(Template.toDockerfile(Template().fromImage('debian:12').skipCache().runCmd('true')).split('\n')[0], 'FROM debian:12')
  assert.equal(await Template.aliasExists(name('no-such')), false)
  const cloned = await built(Template().fromTemplate('python')
    .runCmd('git init -q /tmp/of && cd /tmp/of && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m first')
    .gitClone('/tmp/of', 'clone').runCmd('git -C clone log --format=%s').setReadyCmd('true'), name('clone'))
  assert.match(cloned.text, /^first$/m)

  const refused = async (method, template, want) => {
    const error = await Template.build(template, name('refused')).then(() => null, (e) => e)
    assert.match(error.message, want)
    note(`template.${method}`, { message: `501: ${error.message.replace(/^[0-9]{3}:? */, '')}` })
  }
  await refused('addMcpServer', Template().fromTemplate('mcp-gateway').addMcpServer('exa'), /404.*mcp-gateway/)
  await refused('betaDevContainerPrebuild', Template().fromTemplate('devcontainer').betaDevContainerPrebuild('/w'), /404.*devcontainer/)
  await refused('betaSetDevContainerStart', Template().fromTemplate('devcontainer').betaSetDevContainerStart('/w'), /404.*devcontainer/)
})
