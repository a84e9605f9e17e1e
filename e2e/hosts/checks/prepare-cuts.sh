# The data directory as it is before the first cut: a server that has its template.
mkdir -p /var/lib/cay
mount LABEL=data /var/lib/cay
install_unit CAY_POOL_ENABLED=false
systemctl stop cay
umount /var/lib/cay
