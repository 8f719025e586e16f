"""What a user gives: photos, labels for measuring, class names; and the one way to the pixels of a network."""
