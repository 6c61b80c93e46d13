//! Path-MTU proof between two nodes.
