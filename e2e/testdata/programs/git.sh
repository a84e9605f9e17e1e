# A tree of 20,000 files: added, committed, changed, cloned, packed, checked.
rm -rf /tmp/git && mkdir -p /tmp/git && cd /tmp/git
export HOME=/tmp/git
git config --global user.email tried@example.test
git config --global user.name tried
git config --global gc.auto 0
git init -q large
cd large
python3 -c '
import os
for d in range(200):
    os.makedirs(f"d{d}")
    for f in range(100):
        open(f"d{d}/f{f}", "w").write(f"{d} {f}\n" * 20)
'
git add -A
git commit -qm one
echo changed >>d7/f7
test "$(git status --porcelain)" = " M d7/f7"
git commit -qam two
git gc -q
git fsck --no-progress
git clone -q --no-local /tmp/git/large /tmp/git/clone
cd /tmp/git/clone
git checkout -q HEAD~1
test "$(git ls-files | wc -l)" = 20000
git log --oneline --all | wc -l | grep '^2$'
