"""What makes flexlocal known to other libraries; each loads its library when it is imported."""
