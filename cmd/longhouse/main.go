// Command longhouse runs and inspects Longhouse nodes. Copy this file to compile
// your own applications, interceptors and valves in.
package main

import "github.com/longhouse-go/longhouse/cmd"

func main() {
	cmd.Main()
}
