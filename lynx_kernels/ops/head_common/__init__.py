"""What linear_cross_entropy and token_log_probs share: an output head that scores a label of chosen rows."""
