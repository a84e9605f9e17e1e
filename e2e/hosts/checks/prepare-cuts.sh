# Prepares the data directory for the first cut: a server with its template.
mkdir -p /var/lib/cay
mount LABEL=data /var/lib/cay
install_unit CAY_POOL_ENABLED=false
systemctl stop cay
umount /var/lib/cay
