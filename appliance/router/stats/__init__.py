"""What recent traffic says: sliding windows and estimators. Pure."""
