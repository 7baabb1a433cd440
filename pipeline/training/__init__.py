"""The student's training: losses, batches, Lightning module, loop, the int8 grid."""
