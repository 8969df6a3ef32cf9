"""The kernel's table of tracked connections, by netlink: a socket that hears of each one that is translated (NAT).

Opened with CAP_NET_ADMIN, read without. It imports nothing heavy, because privileges are still there when it is used.
Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.
"""

import ctypes
import socket
import struct
import sys

from tcpio_otel.errors import EnvironmentFault

NETLINK_NETFILTER, SOL_NETLINK, ADD_MEMBERSHIP = 12, 270, 1
GROUP_NEW = 1  # NFNLGRP_CONNTRACK_NEW
GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
NEW = 1 << 8  # IPCTNL_MSG_CT_NEW
REQUEST_DUMP = 0x001 | 0x300  # NLM_F_REQUEST, NLM_F_DUMP
STATUS = 3  # CTA_STATUS
TRANSLATED = 0x30  # IPS_SRC_NAT, IPS_DST_NAT
_MULTI, _ERROR = 2, 2  # NLM_F_MULTI, NLMSG_ERROR
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33

BUFFER = 8 << 20
"""Bytes of messages that wait to be read: some ten thousand connections."""

_LOW = 0 if sys.byteorder == "little" else 1  # of a header field of two bytes, the lower one
_ATTRIBUTE = -0x1000 + 12 & 0xFFFF_FFFF  # SKF_AD_OFF + SKF_AD_NLATTR
_FILTER = (  # classic BPF: code, jump if true, jump if false, operand
    (0x30, 0, 0, 6 + _LOW), (0x45, 9, 0, _MULTI),  # many messages in one, which answer the dump: let them pass
    (0x30, 0, 0, 4 + _LOW), (0x15, 7, 0, _ERROR),
    (0x00, 0, 0, 20), (0x01, 0, 0, STATUS), (0x20, 0, 0, _ATTRIBUTE),  # behind the headers, find the status
    (0x15, 4, 0, 0), (0x07, 0, 0, 0), (0x40, 0, 0, 4), (0x45, 0, 1, TRANSLATED),
    (0x06, 0, 0, 0xFFFF_FFFF),
    (0x06, 0, 0, 0),
)  # fmt: skip


def listen() -> socket.socket:
    """A socket that hears of translated connections in this network namespace, first of those that are there.

    Raises:
        EnvironmentFault: the kernel does not tell, or not us.
    """
    try:
        heard = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        try:
            program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in _FILTER))
            heard.setsockopt(
                socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(_FILTER), ctypes.addressof(program))
            )
            heard.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
            heard.bind((0, 0))
            heard.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, GROUP_NEW)
            # struct nlmsghdr, struct nfgenmsg: of every address family
            heard.send(struct.pack("=IHHII", 20, GET, REQUEST_DUMP, 1, 0) + bytes(4))
        except OSError:
            heard.close()
            raise
    except OSError as error:
        raise EnvironmentFault(f"the kernel does not tell of translated connections (NAT): {error.strerror}") from None
    return heard
