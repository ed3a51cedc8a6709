// Command rogue is a plugin with a correct handshake that abuses the data
// plane: its first argument says how.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"time"

	"github.com/hashicorp/go-plugin"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
	"github.com/longhouse-go/longhouse/plugins/internal/frame"
)

type control struct{ data *os.File }

func (c *control) Configure(context.Context, bridge.Setup) (bool, error) {
	if os.Args[1] == "refuse" {
		return false, errors.New("rogue: I do not like this node")
	}
	if os.Args[1] == "slow" {
		time.Sleep(time.Hour)
	}
	go c.abuse()
	return false, nil
}
func (*control) Health(context.Context) error                    { return nil }
func (*control) Stats(context.Context) ([]channel.Sample, error) { return nil, nil }
func (*control) Shutdown(context.Context) error                  { return nil }

// abuse answers the call that starts the component, and goes wrong.
func (c *control) abuse() {
	r := frame.NewReader(c.data, frame.DefaultMaxFrame)
	for {
		f, err := r.Next()
		if err != nil {
			os.Exit(1)
		}
		if f.Kind == 1 {
			c.write(frame.Append(nil, frame.Header{Seq: f.Seq, Kind: f.Kind, Flags: frame.FlagReply}))
			break
		}
	}
	time.Sleep(50 * time.Millisecond)
	switch os.Args[1] {
	case "garbage":
		c.write([]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
	case "hugelength":
		c.write(binary.BigEndian.AppendUint32(nil, 1<<30))
	case "shortlength":
		c.write(binary.BigEndian.AppendUint32(nil, 3))
	case "wrongreply":
		c.write(frame.Append(nil, frame.Header{Seq: 424242, Kind: 16, Flags: frame.FlagReply}))
	case "samecall":
		for range 2 {
			c.write(frame.Append(nil, frame.Header{Seq: 1, Kind: 65}))
		}
	case "endlesscalls":
		body := make([]byte, 1000)
		for seq := uint64(1); ; seq++ {
			c.write(frame.Append(nil, frame.Header{Seq: seq, Kind: 65}, body))
		}
	case "endlessevents":
		body := make([]byte, 1<<20)
		for range 2000 {
			c.write(frame.Append(nil, frame.Header{Kind: 80, Flags: frame.FlagEvent}, body))
		}
	case "forbidden":
		// A manager has nothing to apply; it is told so and lives on.
		c.write(frame.Append(nil, frame.Header{Seq: 1, Kind: 66}))
	case "deaf":
		select {} // neither reads nor answers heartbeats
	case "heirs":
		cmd := exec.Command("/bin/sleep", "1000")
		cmd.Stdout, cmd.Stderr = os.NewFile(1, "out"), os.NewFile(2, "err")
		cmd.ExtraFiles = []*os.File{c.data}
		_ = cmd.Start()
		os.Exit(4)
	}
	for {
		if _, err := r.Next(); err != nil {
			os.Exit(1)
		}
	}
}

func (c *control) write(b []byte) {
	if _, err := c.data.Write(b); err != nil {
		os.Exit(1)
	}
}

func main() {
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: bridge.Handshake,
		VersionedPlugins: map[int]plugin.PluginSet{
			bridge.APIVersion: {bridge.ControlName: &bridge.ControlPlugin{Impl: &control{os.NewFile(bridge.DataDescriptor, "data")}}},
		},
		GRPCServer: plugin.DefaultGRPCServer,
	})
}
