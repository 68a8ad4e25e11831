#!/bin/sh
# System packages behind the 3-D views (Open3D, software Vulkan) and the browser check (Chromium).
# Installed where that is possible (apt and root), named plainly where it is not. Never fails: nothing
# but the 3-D views and the browser check depends on them (where Open3D cannot be imported, the demo
# buildings are rendered with embreex, which needs no system packages).
set -u
packages="libusb-1.0-0 libudev1 libidn2-0 libgl1 libegl1 libx11-6 libgomp1 libvulkan1 mesa-vulkan-drivers chromium chromium-driver"

if ! command -v dpkg-query >/dev/null 2>&1; then
    echo "system packages: this is no Debian-like system; the 3-D views need what Debian calls: $packages"
    exit 0
fi
missing=""
for p in $packages; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q "install ok installed" || missing="$missing $p"
done
[ -z "$missing" ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "system packages: installing$missing"
    log=$(mktemp)
    if apt-get update -qq >"$log" 2>&1 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >>"$log" 2>&1; then
        rm -f "$log"
        exit 0
    fi
    # One name that this release does not have must not cost the others.
    for p in $missing; do
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$p" >>"$log" 2>&1 ||
            echo "system packages: $p could not be installed (log: $log)"
    done
    exit 0
fi
echo "system packages: not installed (that needs root and apt):$missing"
echo "  Demo buildings are rendered with embreex, 3-D views are drawn with matplotlib and the browser check is skipped until you run:"
echo "  sudo apt-get install --no-install-recommends$missing"
exit 0
