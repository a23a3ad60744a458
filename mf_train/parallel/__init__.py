"""Everything that makes the plain model parallel: degrees, groups, exchanges, the swap, the ZeRO engine."""
