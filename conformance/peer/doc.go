// Package peer drives Apache Tribes nodes in a Java virtual machine, so that
// tests can put them into one group with Longhouse nodes. It compiles a small
// program of its own (folder java) against the Tribes jars of the machine,
// starts it, and speaks with it over standard input and output.
//
//	tools, err := peer.Find()                  // java, javac and the jars, or what to install
//	prog, err := peer.Build(ctx, tools, dir)
//	jvm, err := prog.Start(ctx, peer.JVMConfig{})
//	node, err := jvm.Open(ctx, peer.Config{Group: "239.255.3.4", GroupPort: 45564})
//	err = node.Send(ctx, peer.Send{Value: peer.Bytes("hello"), Options: 6})
//
// One machine hosts any number of nodes. It ends when its standard input is
// closed, and so never outlives the process that started it.
//
// The package imports the standard library only. Its tests hold the whole
// matrix of interoperability; see TestPeers.
package peer
