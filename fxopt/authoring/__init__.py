"""Tools for who writes patterns: proofs on the spot, and the skeleton to start from."""
