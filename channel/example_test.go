package channel_test

import (
	"context"
	"fmt"
	"log"
	"net"

	"github.com/pion/transport/v2/stdnet"
	"go.uber.org/zap"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/plugins/membership/multicast"
)

// README: join

// join makes one member of a group on this machine.
func join(name string, port int, l channel.Listener) (*channel.Channel, error) {
	network, err := stdnet.NewNet()
	if err != nil {
		return nil, err
	}
	s := channel.Settings{Name: name, Logger: zap.NewNop(), Net: network}
	group := multicast.Default()
	group.Bind, group.Port = "127.0.0.1", port
	membership, err := multicast.New(group, s)
	if err != nil {
		return nil, err
	}
	detector, err := failuredetector.Factory.New(channel.NoConfig, s)
	if err != nil {
		return nil, err
	}
	stack, err := channel.NewStack(channel.Layer{Interceptor: detector})
	if err != nil {
		return nil, err
	}
	ch, err := channel.New(channel.Config{
		Announcement: channel.Announcement{Name: name, Pipelined: true},
		Stack:        stack,
		Sender:       tcp.NewSender(tcp.DefaultSenderConfig(), s),
		Receiver:     tcp.NewReceiver(tcp.DefaultReceiverConfig(), s),
		Membership:   membership,
	}, s)
	if err != nil {
		return nil, err
	}
	ch.Listen(l)
	return ch, ch.Start(context.Background())
}

// README: end

func Example() {
	got := make(chan string, 1)
	show := channel.ListenerFunc(func(_ context.Context, m *channel.Message) (bool, error) {
		got <- string(m.Body) + " from " + m.From.Name()
		return true, nil
	})
	port := groupPort()
	a, err := join("a", port, show)
	if err != nil {
		log.Fatal(err)
	}
	defer a.Stop(context.Background())
	b, err := join("b", port, show)
	if err != nil {
		log.Fatal(err)
	}
	defer b.Stop(context.Background())

	met := make(chan struct{}, 1)
	cancel := a.Watch(func(v channel.View, _ channel.MemberEvent) {
		if len(v.Members) > 0 {
			met <- struct{}{}
		}
	})
	defer cancel()
	<-met
	if err := a.Send(context.Background(), a.View().Members, []byte("hello"), channel.SendSyncAck); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-got)
	// Output: hello from a
}

// groupPort finds a port that no other group on this machine uses.
func groupPort() int {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).Port
}
