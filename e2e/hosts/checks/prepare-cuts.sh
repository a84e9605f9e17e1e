# Prepares the machine that is saved: the server is installed and has not run.
install_files CAY_POOL_ENABLED=false
mkdir -p /var/lib/cay
sync
