# A crate that depends on another, built for release, and its tests.
rm -rf /tmp/cargo && mkdir -p /tmp/cargo && cd /tmp/cargo
export CARGO_HOME=/tmp/cargo/home USER=root
cargo new --vcs none --lib --quiet part
cargo new --vcs none --quiet whole
cat >part/src/lib.rs <<'end'
pub fn sum(n: u64) -> u64 { (1..=n).map(|i| std::thread::spawn(move || i)).map(|t| t.join().unwrap()).sum() }
#[test]
fn sums() { assert_eq!(sum(10), 55); }
end
echo 'fn main() { println!("{}", part::sum(100)); }' >whole/src/main.rs
echo 'part = { path = "../part" }' >>whole/Cargo.toml
(cd whole && cargo build --offline --quiet --release && ./target/release/whole | grep '^5050$')
(cd part && cargo test --offline --quiet | grep 'test result: ok')
