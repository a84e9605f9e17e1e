# Prepares the machine that is saved: the server is installed and has not run. The later of two settings counts.
install_files CAY_POOL_ENABLED=false CAY_TEMPLATES_PREPARE=
mkdir -p /var/lib/cay
sync
