// Package cmd is the command line, and the place where everything is put
// together: it hands the built-in interceptors, valves and plugins to the
// container. A composer's own main calls [Main] with further ones. It may import
// every package; none may import it.
package cmd
