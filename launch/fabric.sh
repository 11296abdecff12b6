#!/usr/bin/env bash
# What NCCL, libfabric and gloo are told about the network between machines; launch/torchrun.sh and launch/deepspeed.sh
# source it, and so may you before `dpo-dist launch`: FABRIC=efa && source launch/fabric.sh
#
#   FABRIC            infiniband, efa, tcpx, ethernet, or none: none, which changes nothing
#   FABRIC_INTERFACE  the network interface at which ranks meet: with ethernet that of the default route
#
# A variable that is already set keeps its value, also an empty one. docs/launching.md has the same table; a test
# compares the two. None of it has run on such a network yet.
#
# Sources, named at each value:
#   NCCL    NCCL's user guide, https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
#   torch   https://docs.pytorch.org/docs/stable/distributed.html, "Choosing the network interface to use"
#   fi_efa  libfabric's fabric(7) and fi_efa(7), https://ofiwg.github.io/libfabric/main/man/fi_efa.7.html
#   AWS     1.architectures/efa-cheatsheet.md of https://github.com/aws-samples/awsome-distributed-training
#   Google  gpudirect-tcpx/ of https://github.com/GoogleCloudPlatform/container-engine-accelerators

# Every value is exported here, and only where the user has not decided.
_fabric_set() { [ -n "${!1+set}" ] || export "$1=$2"; }

_fabric_interface() { # an exact name: NCCL takes a name without = for the beginning of one, gloo for all of it
  [ -n "$1" ] || return 0
  _fabric_set NCCL_SOCKET_IFNAME "=$1" # NCCL
  _fabric_set GLOO_SOCKET_IFNAME "$1"  # torch
}

_fabric_efa() {
  # AWS: newer versions of the NCCL plugin find out by themselves what the older ones have to be told.
  _fabric_set FI_PROVIDER efa          # fi_efa: no other provider, such as tcp
  _fabric_set FI_EFA_USE_DEVICE_RDMA 1 # fi_efa, AWS: p4d and newer; where the device has no RDMA the run is aborted
  _fabric_set FI_EFA_USE_HUGE_PAGE 0   # AWS: with huge pages a fork may fail for want of memory
  _fabric_set NCCL_SOCKET_IFNAME en    # AWS: names of p4d's and p5's interfaces begin so; ranks only meet there
}

_fabric_tcpx() {
  # All of it is for a3-highgpu-8g, whose processors and interfaces are always numbered alike.
  local part
  for part in NSOCKS_PERTHREAD=4 SOCKET_NTHREADS=1 CROSS_NIC=0 ALGO=Ring PROTO=Simple NET_GDR_LEVEL=PIX \
    P2P_PXN_LEVEL=0 DYNAMIC_CHUNK_SIZE=524288 P2P_NET_CHUNKSIZE=524288 P2P_PCI_CHUNKSIZE=524288 \
    P2P_NVL_CHUNKSIZE=1048576 BUFFSIZE=4194304 SOCKET_IFNAME=eth0; do
    _fabric_set "NCCL_${part%%=*}" "${part#*=}" # Google: nccl-config.yaml
  done
  # Google: nccl-config.yaml. eth0 is for control, the others carry data; threads are bound beside their interface.
  _fabric_set NCCL_GPUDIRECTTCPX_SOCKET_IFNAME eth1,eth2,eth3,eth4
  _fabric_set NCCL_GPUDIRECTTCPX_CTRL_DEV eth0
  _fabric_set NCCL_GPUDIRECTTCPX_TX_BINDINGS \
    "eth1:8-21,112-125;eth2:8-21,112-125;eth3:60-73,164-177;eth4:60-73,164-177"
  _fabric_set NCCL_GPUDIRECTTCPX_RX_BINDINGS \
    "eth1:22-35,126-139;eth2:22-35,126-139;eth3:74-87,178-191;eth4:74-87,178-191"
  _fabric_set NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS 500000
  _fabric_set NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX /run/tcpx # Google: nccl-test.yaml, where its daemon listens
  _fabric_set GLOO_SOCKET_IFNAME eth0                         # torch; the control network of Google's file
}

_fabric() {
  case ${FABRIC:-none} in
  none)
    [ -z "${FABRIC_INTERFACE:-}" ] && return 0
    echo "error: FABRIC_INTERFACE=$FABRIC_INTERFACE has no effect without FABRIC; set FABRIC too, as to ethernet" >&2
    return 2
    ;;
  infiniband | efa | tcpx | ethernet) ;;
  *)
    echo "error: FABRIC=$FABRIC is not known; one of infiniband, efa, tcpx, ethernet, none" >&2
    return 2
    ;;
  esac
  _fabric_interface "${FABRIC_INTERFACE:-}"
  case $FABRIC in
  infiniband)
    _fabric_set NCCL_NET IB       # NCCL: without InfiniBand the run ends, in place of going on slowly by TCP
    _fabric_set NCCL_IB_HCA mlx5  # NCCL: all ports of all cards whose name begins so
    ;;
  efa) _fabric_efa ;;
  tcpx) _fabric_tcpx ;;
  ethernet)
    _fabric_set NCCL_NET Socket # NCCL: no InfiniBand or RoCE, also where a card is seen
    _fabric_interface "$(awk '$2 == "00000000" { print $1; exit }' /proc/net/route 2> /dev/null)"
    ;;
  esac
}

_fabric
