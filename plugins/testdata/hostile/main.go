// Command hostile is a program that misbehaves before it is a plugin: its first
// argument says how. It uses the standard library only.
package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	dir := os.Getenv("PLUGIN_UNIX_SOCKET_DIR")
	if dir == "" {
		dir = os.TempDir()
	}
	sock := filepath.Join(dir, "sock")
	if _, err := net.Listen("unix", sock); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	cert := strings.Repeat("QUJD", 200)
	switch os.Args[1] {
	case "crash":
		fmt.Fprintln(os.Stderr, "no licence found")
		os.Exit(7)
	case "panic":
		panic("hostile by design")
	case "silent":
		time.Sleep(time.Hour)
	case "chatter":
		fmt.Println("Starting up, please wait...")
	case "endlessline":
		for {
			if _, err := os.Stdout.WriteString(strings.Repeat("x", 1<<20)); err != nil {
				return
			}
		}
	case "halfline":
		fmt.Print("1|1|un")
		return
	case "core":
		fmt.Printf("2|1|unix|%s|grpc|%s\n", sock, cert)
	case "oldapi":
		fmt.Printf("1|0|unix|%s|grpc|%s\n", sock, cert)
	case "newapi":
		fmt.Printf("1|99|unix|%s|grpc|%s\n", sock, cert)
	case "netrpc":
		fmt.Printf("1|1|unix|%s|netrpc|%s\n", sock, cert)
	case "protocol":
		fmt.Printf("1|1|unix|%s|carrier-pigeon|%s\n", sock, cert)
	case "otherhost":
		fmt.Printf("1|1|tcp|192.0.2.1:80|grpc|%s\n", cert)
	case "loopback":
		fmt.Printf("1|1|tcp|127.0.0.1:80|grpc|%s\n", cert)
	case "othersocket":
		fmt.Printf("1|1|unix|/var/run/docker.sock|grpc|%s\n", cert)
	case "dotdot":
		fmt.Printf("1|1|unix|%s/../../sock|grpc|%s\n", dir, cert)
	case "symlink":
		link := filepath.Join(dir, "link")
		_ = os.Symlink("/", link)
		fmt.Printf("1|1|unix|%s/tmp|grpc|%s\n", link, cert)
	case "nosocket":
		fmt.Printf("1|1|unix|%s/nothing|grpc|%s\n", dir, cert)
	case "nocert":
		fmt.Printf("1|1|unix|%s|grpc|\n", sock)
	case "garbagecert":
		fmt.Printf("1|1|unix|%s|grpc|%s\n", sock, cert)
	case "base64":
		fmt.Printf("1|1|unix|%s|grpc|%s\n", sock, strings.Repeat("!", 800))
	case "control":
		fmt.Printf("\x1b[2J1|1|\x00\n")
	case "grandchild":
		// The child keeps the pipes and the socket pair; the parent dies.
		cmd := exec.Command(os.Args[0], "silent")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.ExtraFiles = []*os.File{os.NewFile(3, "data")}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(9)
	}
	time.Sleep(time.Hour)
}
