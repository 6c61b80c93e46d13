//! Services on this node.

mod lb;
