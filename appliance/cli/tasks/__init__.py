"""Commands about saved tasks, their calibration, and classifiers."""
