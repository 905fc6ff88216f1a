"""The experience log: what was asked, sampled, graded and shipped."""
