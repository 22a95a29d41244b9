"""RMSNorm, with residual addition."""
