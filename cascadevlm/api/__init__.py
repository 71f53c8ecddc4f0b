"""What Python callers and notebooks use: the cascade with all its methods, and the scikit-learn estimator."""
