# Prepares the machine and the data directory for the first cut: a server with its template. The first start puts the
# directory on the disk of the data.
install_unit CAY_POOL_ENABLED=false
systemctl stop cay
systemctl disable -q cay
mv /var/lib/cay /root/prepared
mkdir -p /var/lib/cay
sync
