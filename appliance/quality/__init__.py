"""What a cascade's traffic teaches, and how good models are on rows with known answers. README.md is the way in."""
