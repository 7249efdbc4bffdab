"""What prepares the Kaggle kernel, pushes it and brings its results back."""
