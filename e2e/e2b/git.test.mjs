import { assert, withSandbox } from './lib.mjs'

withSandbox('git', async (sandbox, t) => {
  const git = sandbox.git
  if (!git) return t.skip('this client has no git')
  await git.init('/home/user/repo', { initialBranch: 'main' })
  await git.configureUser('A Person', 'person@example.com')
  await sandbox.files.write('repo/file', 'text')
  await git.add('/home/user/repo')
  await git.commit('/home/user/repo', 'first')
  const status = await git.status('/home/user/repo')
  assert.equal(status.currentBranch, 'main')
  assert.equal(status.fileStatus.length, 0)
  await git.createBranch('/home/user/repo', 'side')
  assert.ok((await git.branches('/home/user/repo')).branches.includes('side'))
  assert.equal((await sandbox.commands.run('git clone -q /home/user/repo copy && cat copy/file')).stdout, 'text')
})
