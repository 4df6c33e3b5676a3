"""What came out: scores, accuracy, calibration, similarity, statistics over draws."""
