"""What trains any task by any method on any mesh, and goes on where it was stopped."""
